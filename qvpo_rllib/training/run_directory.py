"""A run directory that explains itself and survives a crash at any moment.

    config.json         the resolved configuration
    run.json            {"starts": [...]}: command line, time, versions and machine of each start
    metrics.jsonl       one row per line; the only source of the two entries below
    metrics.parquet     the same rows as columns, written by `compact`
    tensorboard/        every numeric value of every row, x = env steps
    checkpoints/        numbered directories, the newest few; `last` and `best` are relative links

Files are replaced, never rewritten in place, except `metrics.jsonl`, which is appended to: a line
cut short by a crash is ignored by readers and removed by `open`.
"""

import contextlib
import json
import math
import numbers
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvpo_rllib.files import LOCK_FILE, DirectoryLock, sync, write_atomically
from qvpo_rllib.training.records import describe_start

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Value = float | int | str | None
Row = dict[str, Value]

NUMBERED = re.compile(r"\d{9,}(-\d+)?")
# An empty file in each checkpoint that was the best when saved: `open` sees by it whether a crash
# came after `last` was re-pointed and before `best` was.
BEST_MARK = ".best"


class RunDirectory:
    """One process at a time may write to a run directory; any number may read its files.

    `create` and `open` see to that with a lock, which `close` releases.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        """For `create` and `open`, which check the path."""
        self.path = path
        self.config = config
        self.keep = int(config.get("keep_checkpoints", 1))
        self._metrics = path / "metrics.jsonl"
        self._checkpoints = path / "checkpoints"
        self._tensorboard: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._made_path = False
        self._lock: DirectoryLock | None = None

    @classmethod
    def create(
        cls, path: Path | str, config: Mapping[str, Any], command: Sequence[str]
    ) -> "RunDirectory":
        """A new run in `path`. Raises `ValueError` unless that is absent or an empty directory."""
        path = Path(path)
        _refuse_occupied(path)
        text = json.dumps(dict(config), indent=2, allow_nan=False)
        # Back from JSON, so that a new run and a resumed one see the same configuration.
        run = cls(path, json.loads(text))
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
            write_atomically(path / "config.json", text.encode() + b"\n")
            run._record_start(command)
        return run

    @classmethod
    def open(
        cls,
        path: Path | str,
        command: Sequence[str],
        check: Callable[[Mapping[str, Any], Path], None] | None = None,
    ) -> "RunDirectory":
        """The run in `path`, to be resumed; repairs what a crash left half done.

        Args:
            check: is called with the configuration and the directory of `checkpoints/last` before
                anything is changed, and raises `ValueError` unless a run can go on from it.

        Raises:
            ValueError: `path` holds no run, or a run without a whole `checkpoints/last`, or another
                program is writing to it.
        """
        path = Path(path)
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
                check(run.config, last_checkpoint)
            whole_bytes = _read_metrics(run._metrics)[1]
            if run._metrics.exists():
                os.truncate(run._metrics, whole_bytes)
            last = run._target("last")
            if last is not None and (run._checkpoints / last / BEST_MARK).exists():
                run._point("best", last)
            run._clean_checkpoints()
            run._record_start(command)
        return run

    def append(self, row: Mapping[str, Value]) -> None:
        """Adds one row; on return it is safe from a crash of this process.

        `row["env_steps"]`, the environment steps so far, is required. NaN and infinities, which
        JSON lacks, become null; null is not shown in TensorBoard. Raises `ValueError`.
        """
        clean = {name: _plain_value(name, value) for name, value in row.items()}
        env_steps = clean.get("env_steps")
        if not isinstance(env_steps, int):
            raise ValueError(
                f"A metrics row has env_steps={row.get('env_steps')!r}: it must have an integer "
                f"under that key. Its keys are: {', '.join(row) or 'none'}."
            )
        start = self._metrics.stat().st_size if self._metrics.exists() else 0
        try:
            with self._metrics.open("ab") as file:
                file.write(json.dumps(clean).encode() + b"\n")
        except OSError:
            # A full disk may have taken part of the line; the next row must not follow that part.
            if self._metrics.exists():
                os.truncate(self._metrics, start)
            raise
        writer = self._tensorboard_writer()
        for name, value in clean.items():
            if name != "env_steps" and isinstance(value, int | float):
                writer.add_scalar(name, value, env_steps)

    def rows(self) -> list[Row]:
        """All whole rows, oldest first. Raises `ValueError` for a damaged line before the last."""
        return _read_metrics(self._metrics)[0]

    def truncate_after(self, env_steps: int) -> None:
        """Drops the rows beyond `env_steps`, the steps of the checkpoint that a run resumes from.

        The run will write them again; TensorBoard drops them when the next row is appended.
        """
        kept = [row for row in self.rows() if int(row["env_steps"] or 0) <= env_steps]
        write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())
        if (self.path / "metrics.parquet").exists():
            self.compact()
        self._close_tensorboard()
        self._purge_step = env_steps + 1

    def compact(self) -> Path:
        """Writes `metrics.parquet`: a column for every key of any row, null where a row lacks it.

        A column is int64 or float64 if its values are numbers, and text if any of them is text.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = self.rows()
        names = dict.fromkeys(["env_steps", *(name for row in rows for name in row)])
        table = pa.table({name: _column([row.get(name) for row in rows]) for name in names})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_atomically(self.path / "metrics.parquet", sink.getvalue().to_pybytes())
        return self.path / "metrics.parquet"

    def commit_checkpoint(
        self,
        env_steps: int,
        write: Callable[[Path], None],
        *,
        best: bool,
        prune: Callable[[Path], None] | None = None,
    ) -> Path:
        """Saves checkpoint number `env_steps`, and points `last`, and `best` if `best`, to it.

        `write` fills the empty directory that it is given; if it raises, nothing has changed. A
        crash at any moment leaves the previous `last` and `best` whole. Of the others the newest
        are kept as config's `keep_checkpoints` says (1: `last` alone). `prune` is called with the
        directory of a `best` that is none of the newest: it takes out what only training needs.
        """
        self._clean_checkpoints()
        temporary = self._checkpoints / f".tmp-{env_steps}-{os.getpid()}"
        temporary.mkdir()
        try:
            write(temporary)
            if best:
                (temporary / BEST_MARK).touch()
            sync(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        number = self._free_number(env_steps)
        os.rename(temporary, self._checkpoints / number)
        self._point("last", number)
        if best:
            self._point("best", number)
        self._clean_checkpoints()
        best_number = self._target("best")
        if prune is not None and best_number is not None and best_number not in self._newest():
            prune(self._checkpoints / best_number)
        return self._checkpoints / number

    def checkpoint(self, name: str) -> Path:
        """The numbered directory that `last` or `best` points to, or `ValueError`."""
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
        write_atomically(self.path / "config.json", json.dumps(config, indent=2).encode() + b"\n")
        self.config = dict(config)

    def discard_if_empty(self) -> bool:
        """Removes a directory in which nothing has been recorded yet; says whether it did."""
        if any(self._checkpoints.iterdir()) or self.rows():
            return False
        self._close_tensorboard()
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if self._made_path:
            self.path.rmdir()
        self.close()
        return True

    def close(self) -> None:
        """Ends writing: nothing more is held in memory, and other programs may write.

        May be called twice.
        """
        self._close_tensorboard()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Takes the lock; keeps it unless the block raises."""
        self._lock = DirectoryLock(self.path)
        try:
            yield
        except BaseException:
            self._lock.release()
            raise

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _record_start(self, command: Sequence[str]) -> None:
        file = self.path / "run.json"
        starts = json.loads(file.read_text())["starts"] if file.exists() else []
        starts.append(describe_start(command))
        write_atomically(file, json.dumps({"starts": starts}, indent=2).encode() + b"\n")

    def _tensorboard_writer(self) -> "SummaryWriter":
        if self._tensorboard is None:
            # Imported when first needed: it takes seconds, which readers of a run are spared.
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(self.path / "tensorboard"), purge_step=self._purge_step, flush_secs=10
            )
            self._purge_step = None
        return self._tensorboard

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
        """`last` and those before it, as many as are kept. A crash may have left one after it."""
        last = self._target("last")
        if last is None:
            return []
        names = (entry.name for entry in self._checkpoints.iterdir())
        numbers = {name for name in names if NUMBERED.fullmatch(name)} - {last}
        before = sorted((n for n in numbers if _env_steps(n) <= _env_steps(last)), key=_env_steps)
        return [last, *before[::-1]][: self.keep]

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
    if not os.path.lexists(path):
        return
    if path.is_dir() and not {entry.name for entry in path.iterdir()} - {LOCK_FILE}:
        return
    advice = "Give another --run-dir, which must not exist yet or be empty."
    what = "is a directory with other files in it" if path.is_dir() else "is a file"
    if any((path / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints")):
        what = "already holds a run"
        advice = f"Continue it with `--resume {path}`, or give another --run-dir."
    raise ValueError(f"Cannot start a run in {str(path)!r}: it {what}. {advice}")


def _read_metrics(path: Path) -> tuple[list[Row], int]:
    """The whole rows of a `metrics.jsonl`, and how many bytes of the file they take."""
    rows: list[Row] = []
    whole_bytes = 0
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for index, line in enumerate(lines):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            if index < len(lines) - 1:
                raise ValueError(
                    f"Line {index + 1} of {str(path)!r} is damaged: {line[:60]!r} is not a JSON "
                    "object, and is not the last line. Delete the line to go on without it."
                )
            break
        rows.append(row)
        whole_bytes += len(line)
    return rows, whole_bytes


def _plain_value(name: str, value: Any) -> Value:
    """`value` as JSON knows it; numpy's numbers become Python's, and NaN and infinities null."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise ValueError(f"The metric {name}={value!r} is not allowed: it must be a number or a text.")


def _column(values: Sequence[Value]) -> Any:
    import pyarrow as pa

    if any(isinstance(value, str) for value in values):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
    if all(value is None or isinstance(value, int) for value in values) and any(
        value is not None for value in values
    ):
        return pa.array(values, pa.int64())
    return pa.array([None if value is None else float(value) for value in values], pa.float64())


def can_resume(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether `path` holds a run of `config` that can be gone on with.

    A run that ended before its first checkpoint cannot: its directory is renamed, with "-unsaved-"
    and the time, and the run begins anew.

    Args:
        config: what `config.json` would hold for a new run.

    Raises:
        ValueError: `path` holds a run with other settings, or one that another program is still
            writing. Nothing is changed.
    """
    file = path / "config.json"
    if not file.exists():
        return False
    found = json.loads(file.read_text())
    own = json.loads(json.dumps(dict(config)))
    changed = sorted(name for name in {*own, *found} if own.get(name) != found.get(name))
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
