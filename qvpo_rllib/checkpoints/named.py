"""`last` and `best`: the names that a run gives to two of its numbered checkpoints.

A name is a relative symbolic link, or, where a file system has none, a file that holds the number.
"""

import os
import re
import shlex
from pathlib import Path

from qvpo_rllib.files import fsync

CHECKPOINTS = "checkpoints"  # in the directory of a run
NAMES = ("last", "best")
NUMBERED = re.compile(r"\d{9,}(-\d+)?")


def point(checkpoints: Path, name: str, number: str) -> None:
    """Lets `name` mean the checkpoint `number`, atomically."""
    link, temporary = checkpoints / name, checkpoints / f".tmp-link-{name}"
    if link.is_dir() and not link.is_symlink():
        # The run was copied by a program that turns links into directories, such as scp.
        os.rename(link, checkpoints / f".tmp-was-{name}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(number)
    except OSError:  # there are none here; a full disk refuses the file, too
        temporary.write_text(number + "\n")
        fsync(temporary)
    os.replace(temporary, link)


def target(checkpoints: Path, name: str) -> str | None:
    """Returns the number that `name` stands for; None if it stands for none.

    Raises:
        ValueError: it points to something that is none of the run's checkpoints.
    """
    pointed = _pointed(checkpoints / name)
    if pointed is None:
        return None
    found = Path(os.path.realpath(checkpoints / pointed))
    if found.parent != Path(os.path.realpath(checkpoints)) or not NUMBERED.fullmatch(found.name):
        raise ValueError(
            f"{str(checkpoints / name)!r} points to {pointed!r}, which is none of the run's "
            f"checkpoints. {_advice(checkpoints, name)}"
        )
    return found.name


def find(run: Path, name: str) -> Path | None:
    """Returns the directory that `name` points to, wherever it is; None if it is not there."""
    checkpoints = run / CHECKPOINTS
    directory = checkpoints / (_pointed(checkpoints / name) or name)
    return directory.resolve() if directory.is_dir() else None


def get(run: Path, name: str) -> Path:
    """Returns the directory of the run's own checkpoint `name`; `ValueError` if there is none."""
    if name not in NAMES:
        raise ValueError(f"There is no checkpoint {name!r}: it must be 'last' or 'best'.")
    checkpoints = run / CHECKPOINTS
    number, directory = target(checkpoints, name), find(run, name)
    if directory is None:
        raise ValueError(
            f"{str(run)!r} has no checkpoint {name!r}: {str(checkpoints / name)!r} is missing"
            + (f", as it points to {number!r}. " if number else ". ")
            + _advice(checkpoints, name)
        )
    return directory


def env_steps(number: str) -> int:
    """Returns the env steps at which the checkpoint `number` was saved."""
    return int(number.split("-")[0])


def _pointed(link: Path) -> str | None:
    if link.is_symlink():
        return os.readlink(link)
    return link.read_text(errors="replace").strip() if link.is_file() else None


def _advice(checkpoints: Path, name: str) -> str:
    """Returns how to name the newest checkpoint that is there."""
    entries = checkpoints.iterdir() if checkpoints.is_dir() else ()
    numbers = [entry.name for entry in entries if NUMBERED.fullmatch(entry.name)]
    if not numbers:
        return "If the run ended before it saved one, start anew in another --run-dir."
    command = ["ln", "-sfn", max(numbers, key=env_steps), str(checkpoints / name)]
    return f"This takes the newest that is there: `{shlex.join(command)}`."
