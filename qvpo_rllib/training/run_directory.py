"""A run directory that explains itself and survives a crash at any moment.

    config.json         the resolved configuration
    run.json            {"starts": [...]}: command line, time, versions and machine of each start
    workers.json        where rollout workers were placed (`records`)
    metrics.jsonl, metrics.parquet, tensorboard/    what was measured (`metrics_log`)
    checkpoints/        numbered directories, the newest few; `last` and `best` are relative links

Files are replaced, never rewritten in place, except `metrics.jsonl`, which is appended to.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from qvpo_rllib.files import LOCK_FILE, DirectoryLock, fsync, new_directory, write_json
from qvpo_rllib.training.metrics_log import MetricsLog
from qvpo_rllib.training.records import describe_start

NUMBERED = re.compile(r"\d{9,}(-\d+)?")
# An empty file in each checkpoint that was the best when saved: `open` sees by it whether a crash
# came after `last` was re-pointed and before `best` was.
BEST_MARK = ".best"


class RunDirectory:
    """One process at a time may write to a run directory; any number may read its files.

    `create` and `open` see to that with a lock, which `close` releases.

    Attributes:
        path: the directory.
        config: the content of its `config.json`.
        metrics: the rows of its `metrics.jsonl`.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        """Called by `create` and `open`, which check the path."""
        self.path = path
        self.config = config
        self.metrics = MetricsLog(path)
        self._keep = int(config.get("keep_checkpoints", 1))
        self._checkpoints = path / "checkpoints"
        self._made_path = False
        self._lock: DirectoryLock | None = None

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], command: Sequence[str]) -> Self:
        """Returns a new run in `path`.

        Args:
            config: the content of `config.json`.
            command: the command line, for `run.json`.

        Raises:
            ValueError: `path` is neither absent nor an empty directory, or it cannot be made.
        """
        _refuse_occupied(path)
        # By way of JSON, so that a new run and a resumed one see the same configuration.
        run = cls(path, json.loads(json.dumps(dict(config), allow_nan=False)))
        run._made_path = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"The run directory {str(path)!r} cannot be made: {error}. Give another --run-dir."
            ) from error
        with run._locked():
            _refuse_occupied(path)  # again: another program may have begun meanwhile
            (path / "checkpoints").mkdir()
            write_json(path / "config.json", run.config)
            run._record_start(command)
        return run

    @classmethod
    def open(
        cls,
        path: Path,
        command: Sequence[str],
        check: Callable[[Path], None] | None = None,
    ) -> Self:
        """Returns the run in `path`, to be resumed; repairs what a crash left half done.

        Args:
            check: is called with the directory of `checkpoints/last` before anything is changed,
                and raises `ValueError` unless a run can go on from it.

        Raises:
            ValueError: `path` holds no run, or a run without a whole `checkpoints/last`, or another
                program is writing to it.
        """
        missing = [name for name in ("config.json", "checkpoints") if not (path / name).exists()]
        if missing:
            raise ValueError(
                f"Cannot resume {str(path)!r}: it is not a run directory, as it has no "
                f"{' and no '.join(missing)}. Give the --run-dir of a run that was started."
            )
        try:
            run = cls(path, json.loads((path / "config.json").read_text()))
        except ValueError as error:
            raise ValueError(
                f"Cannot resume {str(path)!r}: its config.json is damaged ({error}). Restore that "
                "file, or start a new run in another --run-dir."
            ) from None
        with run._locked():
            last_checkpoint = run.checkpoint("last")
            if check is not None:
                check(last_checkpoint)
            run.metrics.repair()
            last = run._target("last")
            if last is not None and (run._checkpoints / last / BEST_MARK).exists():
                run._point("best", last)
            run._clean_checkpoints()
            run._record_start(command)
        return run

    def commit_checkpoint(
        self,
        env_steps: int,
        write: Callable[[Path], None],
        *,
        best: bool,
        prune: Callable[[Path], None] | None = None,
    ) -> Path:
        """Saves checkpoint number `env_steps`, and points `last`, and `best` if `best`, to it.

        Returns its directory. A crash at any moment leaves the previous `last` and `best` whole. Of
        the others the newest are kept as config's `keep_checkpoints` says (1: `last` alone).

        Args:
            write: fills the empty directory that it is given, plainly: it need neither flush files
                to disk nor care for crashes. If it raises, nothing has changed.
            prune: is called with the directory of a `best` that is none of the newest; takes out
                what only training needs.
        """
        self._clean_checkpoints()
        number = self._free_number(env_steps)
        temporary = self._checkpoints / f".tmp-{env_steps}-{os.getpid()}"
        with new_directory(self._checkpoints / number, temporary):
            write(temporary)
            if best:
                (temporary / BEST_MARK).touch()
        self._point("last", number)
        if best:
            self._point("best", number)
        fsync(self._checkpoints)  # the links are on disk before what they pointed to is deleted
        self._clean_checkpoints()
        best_number = self._target("best")
        if prune is not None and best_number is not None and best_number not in self._newest():
            prune(self._checkpoints / best_number)
        return self._checkpoints / number

    def checkpoint(self, name: str) -> Path:
        """Returns the directory that "last" or "best" points to; `ValueError` if there is none."""
        if name not in ("last", "best"):
            raise ValueError(f"There is no checkpoint {name!r}: it must be 'last' or 'best'.")
        link = self._checkpoints / name
        if not link.is_dir():
            raise ValueError(
                f"{str(self.path)!r} has no checkpoint {name!r}: {str(link)!r} is missing"
                + (f", as it points to {os.readlink(link)!r}" if link.is_symlink() else "")
                + ". If the run ended before it saved one, start anew in another --run-dir."
            )
        return link.resolve()

    def change_config(self, config: Mapping[str, Any]) -> None:
        """Replaces `config.json`, atomically."""
        write_json(self.path / "config.json", config)
        self.config = dict(config)

    def discard_if_empty(self) -> bool:
        """Removes the directory if nothing has been recorded yet; returns whether it did."""
        if any(self._checkpoints.iterdir()) or self.metrics.rows():
            return False
        self.metrics.close()
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if self._made_path:
            self.path.rmdir()
        self.close()
        return True

    def close(self) -> None:
        """Ends writing, so that other programs may write. May be called twice."""
        self.metrics.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Takes the lock; keeps it unless the block raises."""
        with contextlib.ExitStack() as on_error:
            self._lock = on_error.enter_context(DirectoryLock(self.path))
            yield
            on_error.pop_all()

    def _record_start(self, command: Sequence[str]) -> None:
        file = self.path / "run.json"
        starts = json.loads(file.read_text())["starts"] if file.exists() else []
        write_json(file, {"starts": [*starts, describe_start(command)]})

    def _target(self, name: str) -> str | None:
        link = self._checkpoints / name
        return os.readlink(link) if link.is_symlink() else None

    def _point(self, name: str, number: str) -> None:
        link, temporary = self._checkpoints / name, self._checkpoints / f".tmp-link-{name}"
        if link.is_dir() and not link.is_symlink():
            # The run was copied by a program that turns links into directories, such as scp.
            os.rename(link, self._checkpoints / f".tmp-was-{name}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(number)
        os.replace(temporary, link)

    def _free_number(self, env_steps: int) -> str:
        number, copy = f"{env_steps:09d}", 1
        while (self._checkpoints / number).exists():
            copy += 1
            number = f"{env_steps:09d}-{copy}"
        return number

    def _newest(self) -> list[str]:
        """Returns `last` and those before it, as many as are kept. A crash may leave one after."""
        last = self._target("last")
        if last is None:
            return []
        names = {entry.name for entry in self._checkpoints.iterdir()} - {last}
        numbers = sorted(filter(NUMBERED.fullmatch, names), key=_env_steps, reverse=True)
        return [last, *(n for n in numbers if _env_steps(n) <= _env_steps(last))][: self._keep]

    def _clean_checkpoints(self) -> None:
        """Deletes what crashes left, and checkpoints neither named nor among the newest."""
        named = {self._target("last"), self._target("best"), *self._newest()}
        for entry in self._checkpoints.iterdir():
            leftover = entry.name.startswith(".tmp-")
            if leftover and entry.is_symlink():
                entry.unlink()
            elif leftover or (NUMBERED.fullmatch(entry.name) and entry.name not in named):
                shutil.rmtree(entry)


def _env_steps(number: str) -> int:
    return int(number.split("-")[0])


def _refuse_occupied(path: Path) -> None:
    empty = path.is_dir() and {entry.name for entry in path.iterdir()} <= {LOCK_FILE}
    if empty or not os.path.lexists(path):
        return
    advice = "Give another --run-dir, which must not exist yet or be empty."
    what = "is a directory with other files in it" if path.is_dir() else "is a file"
    if any((path / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints")):
        what = "already holds a run"
        advice = f"Continue it with `--resume {path}`, or give another --run-dir."
    raise ValueError(f"Cannot start a run in {str(path)!r}: it {what}. {advice}")


def can_resume(path: Path, config: Mapping[str, Any]) -> bool:
    """Returns whether `path` holds a run of `config` that has a checkpoint to go on from.

    A run that ended before its first checkpoint cannot: its directory is renamed, with "-unsaved-"
    and the time, and the run begins anew.

    Args:
        config: what `config.json` would hold for a new run.

    Raises:
        ValueError: `path` holds a run with other settings, or one that another program is still
            writing. Nothing is changed.
    """
    if not (path / "config.json").exists():
        return False
    found = json.loads((path / "config.json").read_text())
    own = json.loads(json.dumps(dict(config)))
    names = {*own, *found} - {"num_gpus"}  # where it runs
    changed = sorted(name for name in names if own.get(name) != found.get(name))
    if changed:
        raise ValueError(
            f"{str(path)!r} holds a run with other values of {', '.join(changed)}: --or-resume "
            "goes on only with the very run that was begun there. Give the same options as then, "
            f"another --run-dir, or `--resume {path}`, which takes the run's own options."
        )
    if (path / "checkpoints" / "last").is_dir():
        return True
    with DirectoryLock(path):
        path.rename(path.with_name(f"{path.name}-unsaved-{time.strftime('%Y%m%d-%H%M%S')}"))
    return False
