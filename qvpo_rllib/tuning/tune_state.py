"""Ray Tune's saved state of an experiment, of which the last whole copy is kept.

Tune overwrites these files in place, a megabyte now and then: a driver that is killed meanwhile
leaves one that is cut short, and without it nothing can go on.
"""

import json
from pathlib import Path

from qvpo_rllib.files import write_atomically

TUNE_DIRECTORY, KEPT_DIRECTORY = "tune", "tune_state"  # in that of a part of the experiment
FILES = "*state*-*"  # of the experiment, the search and the callbacks: JSON, or pickled


def back_up(part: Path) -> None:
    """Copies what is whole and has changed since the last copy."""
    kept = part / KEPT_DIRECTORY
    for file in (part / TUNE_DIRECTORY).glob(FILES):
        copy = kept / file.name
        if copy.exists() and copy.stat().st_mtime_ns >= file.stat().st_mtime_ns:
            continue
        data = file.read_bytes()
        if _is_whole(data):
            kept.mkdir(exist_ok=True)
            write_atomically(copy, data)


def repair(part: Path) -> None:
    """Puts the kept copies in the place of files that are cut short.

    Raises:
        ValueError: there is no copy of one.
    """
    for file in (part / TUNE_DIRECTORY).glob(FILES):
        if _is_whole(file.read_bytes()):
            continue
        copy = part / KEPT_DIRECTORY / file.name
        if not copy.exists():
            raise ValueError(
                f"Ray Tune's state of the experiment, {str(file)!r}, was cut short before it was "
                "whole for the first time, so the experiment cannot go on. Nothing was changed: "
                "give another --storage, or delete the experiment's directory."
            )
        write_atomically(file, copy.read_bytes())


def _is_whole(data: bytes) -> bool:
    if not data.startswith(b"{"):
        return data.endswith(b".")  # a pickle's last operation
    try:
        json.loads(data)
    except ValueError:
        return False
    return True
