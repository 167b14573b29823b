"""A run directory that explains itself and survives a crash at any moment.

    config.json         the resolved configuration
    run.json            {"starts": [...]}: command line, time, versions and machine of each start
    workers.json        where rollout workers were placed (`records`)
    metrics.jsonl, metrics.parquet, tensorboard/    what was measured (`metrics_log`)
    checkpoints/        numbered directories, the newest few; two have names (`checkpoints.named`)

Files are replaced, never rewritten in place, except `metrics.jsonl`, which is appended to.
"""

import contextlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from qvpo_rllib.checkpoints import named
from qvpo_rllib.files import LOCK_FILE, DirectoryLock, fsync, new_directory, read_json, write_json
from qvpo_rllib.training.metrics_log import MetricsLog
from qvpo_rllib.training.plan import TrainingPlan
from qvpo_rllib.training.records import describe_start

# In each checkpoint that was the best when saved: the mean return in its evaluation. By it `open`
# sees whether a crash came after `last` was re-pointed and before `best` was, and no worse one
# takes the place of `best`, whatever has become of the metrics.
BEST_MARK = "best.json"
FILES = (
    *("config.json", "run.json", "workers.json"),
    *("metrics.jsonl", "metrics.parquet", "learning_curve.png"),
)
DIRECTORIES = ("checkpoints", "tensorboard")


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
        self._keep: int = config.get("keep_checkpoints", 1)
        self._checkpoints = path / named.CHECKPOINTS
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
        check: Callable[[Self], None] | None = None,
    ) -> Self:
        """Returns the run in `path`, to be resumed; repairs what a crash left half done.

        Args:
            check: is called with the run before anything is changed, and raises `ValueError` unless
                it can go on.

        Raises:
            ValueError: `path` holds no run, or a run without a whole `checkpoints/last`, or one of
                its files is damaged, or another program is writing to it.
        """
        missing = [name for name in ("config.json", "checkpoints") if not (path / name).exists()]
        if missing:
            raise ValueError(
                f"Cannot resume {str(path)!r}: it is not a run directory, as it has no "
                f"{' and no '.join(missing)}. Give the --run-dir of a run that was started."
            )
        run = cls(path, read_config(path))
        with run._locked():
            run.checkpoint("last")
            if check is not None:
                check(run)
            run._check_files()
            run.metrics.repair()
            last = run._target("last")
            if last is not None and run._evaluation(last) >= run.best_return():
                named.point(run._checkpoints, "best", last)
            run._clean_checkpoints()
            run._record_start(command)
        return run

    def _check_files(self) -> None:
        """Raises `ValueError` for what would end the run later on."""
        for names, is_one, kind in (
            (FILES, Path.is_file, "a file"),
            (DIRECTORIES, Path.is_dir, "a directory"),
        ):
            for name in names:
                file = self.path / name
                if os.path.lexists(file) and not is_one(file):
                    raise ValueError(
                        f"{str(file)!r} is not {kind}, as it is in a run. Move it away; nothing "
                        "was changed."
                    )
        self._starts()
        self.metrics.rows()

    def best_return(self) -> float:
        """Returns the mean return in the evaluation of `best`; -inf if there is no such thing."""
        return self._evaluation(self._target("best") or "best")

    def _evaluation(self, number: str) -> float:
        """Returns the mean return by which a checkpoint was the best; -inf if it was not."""
        mark = self._checkpoints / number / BEST_MARK
        if not mark.exists():
            return float("-inf")
        return float(read_json(mark, float, "Delete it, and a worse one may replace the best."))

    def commit_checkpoint(
        self,
        env_steps: int,
        write: Callable[[Path], None],
        *,
        best: float | None = None,
        prune: Callable[[Path], None] | None = None,
    ) -> Path:
        """Saves checkpoint number `env_steps`, and points `last`, and maybe `best`, to it.

        Returns its directory. A crash at any moment leaves the previous `last` and `best` whole. Of
        the others the newest are kept as config's `keep_checkpoints` says (1: `last` alone).

        Args:
            write: fills the empty directory that it is given, plainly: it need neither flush files
                to disk nor care for crashes. If it raises, nothing has changed.
            best: the mean return in its evaluation, if it is the best so far.
            prune: is called with the directory of a `best` that is none of the newest; takes out
                what only training needs.
        """
        self._clean_checkpoints()
        number = self._free_number(env_steps)
        temporary = self._checkpoints / f".tmp-{env_steps}-{os.getpid()}"
        with new_directory(self._checkpoints / number, temporary):
            write(temporary)
            if best is not None:
                (temporary / BEST_MARK).write_text(json.dumps(best))
        named.point(self._checkpoints, "last", number)
        if best is not None:
            named.point(self._checkpoints, "best", number)
        fsync(self._checkpoints)  # the links are on disk before what they pointed to is deleted
        self._clean_checkpoints()
        best_number = self._target("best")
        if prune is not None and best_number is not None and best_number not in self._newest():
            prune(self._checkpoints / best_number)
        return self._checkpoints / number

    def checkpoint(self, name: str) -> Path:
        """Returns the directory that "last" or "best" points to; `ValueError` if there is none."""
        return named.get(self.path, name)

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
        starts = [*self._starts(), describe_start(command)]
        write_json(self.path / "run.json", {"starts": starts})

    def _starts(self) -> list[Any]:
        file = self.path / "run.json"
        if not file.exists():
            return []
        advice = "Delete it to go on without the record of earlier starts; nothing was changed."
        starts: list[Any] = read_json(file, dict, advice, {"starts": list})["starts"]
        return starts

    def _target(self, name: str) -> str | None:
        return named.target(self._checkpoints, name)

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
        numbers = sorted(filter(named.NUMBERED.fullmatch, names), key=named.env_steps, reverse=True)
        reached = named.env_steps(last)
        return [last, *(n for n in numbers if named.env_steps(n) <= reached)][: self._keep]

    def _clean_checkpoints(self) -> None:
        """Deletes what crashes left, and checkpoints neither named nor among the newest."""
        kept = {self._target("last"), self._target("best"), *self._newest()}
        for entry in self._checkpoints.iterdir():
            leftover = entry.name.startswith(".tmp-")
            if leftover and (entry.is_symlink() or not entry.is_dir()):
                entry.unlink()
            elif leftover or (named.NUMBERED.fullmatch(entry.name) and entry.name not in kept):
                shutil.rmtree(entry)


def read_config(path: Path) -> dict[str, Any]:
    """Returns the content of the `config.json` of the run in `path`."""
    advice = "Restore that file, or start a new run in another --run-dir."
    config: dict[str, Any] = read_json(path / "config.json", dict, advice)
    return config


def resume_command(path: Path) -> str:
    """Returns what a shell takes to go on with the run in `path`."""
    return shlex.join(["qvpo", "train", "--resume", str(path)])


def _refuse_occupied(path: Path) -> None:
    empty = path.is_dir() and {entry.name for entry in path.iterdir()} <= {LOCK_FILE}
    if empty or not os.path.lexists(path):
        return
    advice = "Give another --run-dir, which must not exist yet or be empty."
    what = "is a directory with other files in it" if path.is_dir() else "is a file"
    if any((path / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints")):
        what = "already holds a run"
        advice = f"Continue it with `{resume_command(path)}`, or give another --run-dir."
        if named.find(path, "last") is None:
            what += " without a last checkpoint to go on from"
            advice = "Give another --run-dir."
    raise ValueError(f"Cannot start a run in {str(path)!r}: it {what}. {advice}")


def can_resume(path: Path, plan: TrainingPlan) -> bool:
    """Returns whether `path` holds a run of `plan` that has a checkpoint to go on from.

    A run that ended before its first checkpoint cannot: its directory is renamed, with "-unsaved-"
    and the time, and the run begins anew.

    Raises:
        ValueError: `path` holds a run with other settings, or a damaged one, or one that another
            program is still writing. Nothing is changed.
    """
    if not (path / "config.json").exists():
        return False
    found, own = (
        json.loads(json.dumps(one.to_dict()))
        for one in (TrainingPlan.from_config(read_config(path)), plan)
    )
    names = own.keys() - {"num_gpus"}  # where it runs
    changed = sorted(name for name in names if own[name] != found[name])
    if changed:
        raise ValueError(
            f"{str(path)!r} holds a run with other values of {', '.join(changed)}: --or-resume "
            "goes on only with the very run that was begun there. Give the same options as then, "
            f"another --run-dir, or `{resume_command(path)}`, which takes the run's own options."
        )
    if named.find(path, "last") is not None:
        return True
    with DirectoryLock(path):
        path.rename(path.with_name(f"{path.name}-unsaved-{time.strftime('%Y%m%d-%H%M%S')}"))
    return False
