"""The metrics of a run, and the table and the curves that are made of them.

    metrics.jsonl      one row per line; the only source of the other two
    metrics.parquet    the same rows as columns, written by `compact`
    tensorboard/       every numeric value of every row, x = env steps

Rows are appended: a line cut short by a crash is ignored by readers, and removed by `repair`.
"""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvpo_rllib.files import replacing, write_atomically
from qvpo_rllib.training.rows import Row, Value, plain_value

if TYPE_CHECKING:
    import pyarrow as pa
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class MetricsLog:
    """The rows of the run in `directory`. Reading needs no `close`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / "metrics.jsonl"
        self._tensorboard: SummaryWriter | None = None
        self._purge_step: int | None = None

    def append(self, row: Mapping[str, Value]) -> None:
        """Adds one row; on return it is safe from a crash of this process.

        NaN and infinities, which JSON lacks, become null; null is not shown in TensorBoard.

        Args:
            row: must have "env_steps", the environment steps so far.

        Raises:
            ValueError: a value is neither a number nor a text, or "env_steps" is no integer.
        """
        clean = {name: plain_value(name, value) for name, value in row.items()}
        env_steps = clean.get("env_steps")
        if not isinstance(env_steps, int):
            raise ValueError(
                f"A metrics row has env_steps={row.get('env_steps')!r}: it must have an integer "
                f"under that key. Its keys are: {', '.join(row) or 'none'}."
            )
        append_line(self._file, clean)
        writer = self._tensorboard_writer()
        for name, value in clean.items():
            if name != "env_steps" and isinstance(value, int | float):
                writer.add_scalar(name, value, env_steps)

    def rows(self) -> list[Row]:
        """Returns all whole rows, oldest first; raises as `read_rows`."""
        return read_rows(self._file)

    def repair(self) -> None:
        """Removes a last line that a crash cut short."""
        repair(self._file)

    def truncate_after(self, env_steps: int) -> None:
        """Drops the rows beyond `env_steps`, the steps of the checkpoint that a run resumes from.

        The run will write them again; TensorBoard drops them when the next row is appended.
        """
        kept = [row for row in self.rows() if int(row["env_steps"] or 0) <= env_steps]
        write_atomically(self._file, "".join(json.dumps(row) + "\n" for row in kept).encode())
        if (self._directory / "metrics.parquet").exists():
            self.compact()
        self.close()
        self._purge_step = env_steps + 1

    def compact(self) -> Path:
        """Writes `metrics.parquet`: a column for every key of any row, null where a row lacks it.

        A column is int64 or float64 if its values are numbers, and text if any of them is text.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, path = self.rows(), self._directory / "metrics.parquet"
        names = dict.fromkeys(["env_steps", *(name for row in rows for name in row)])
        table = pa.table({name: _column([row.get(name) for row in rows]) for name in names})
        with replacing(path) as temporary:
            pq.write_table(table, temporary)
        return path

    def close(self) -> None:
        """Closes TensorBoard's writer, which writes what it holds; `append` opens a new one."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _tensorboard_writer(self) -> "SummaryWriter":
        if self._tensorboard is None:
            # Imported when first needed: it takes seconds, which readers of a run are spared.
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(self._directory / "tensorboard"), purge_step=self._purge_step, flush_secs=10
            )
            self._purge_step = None
        return self._tensorboard


def read_rows(file: Path, *, skip_damaged: bool = False) -> list[Row]:
    """Returns the rows in `file`, oldest first, without a last line that a crash cut short.

    Raises:
        ValueError: the file cannot be read, or a line before the last one is damaged. With
            `skip_damaged` such a line is left out, and a warning says so.
    """
    return _read(file, skip_damaged)[0]


def repair(file: Path) -> None:
    """Removes a last line that a crash cut short, and says so."""
    whole_bytes = _read(file)[1]
    if file.exists() and file.stat().st_size > whole_bytes:
        os.truncate(file, whole_bytes)
        logger.warning("%s: a crash had cut its last line short; it is dropped.", file)


def _read(file: Path, skip_damaged: bool = False) -> tuple[list[Row], int]:
    """Returns the whole rows, and how many bytes of the file they take."""
    rows: list[Row] = []
    whole_bytes = 0
    try:
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}. Move it away.") from error
    for index, line in enumerate(lines):
        row: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line) if line.endswith(b"\n") else None
        if not _is_row(row):
            if index == len(lines) - 1:
                break
            damage = (
                f"Line {index + 1} of {str(file)!r} is damaged: {line[:60]!r} is not a JSON object "
                'of numbers and texts with a whole number "env_steps", and is not the last line.'
            )
            if not skip_damaged:
                raise ValueError(f"{damage} Delete the line to go on without it.")
            logger.warning("%s It is left out.", damage)
            continue
        rows.append(row)
        whole_bytes += len(line)
    return rows, whole_bytes


def _is_row(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("env_steps")) is int
        and all(v is None or isinstance(v, int | float | str) for v in value.values())
    )


def append_line(file: Path, row: Mapping[str, Value]) -> None:
    """Appends `row` to `file` as a line of JSON.

    If that fails, as on a full disk, the part that was written is taken away again: the next row
    must not follow it on the same line.
    """
    start = file.stat().st_size if file.exists() else 0
    try:
        with file.open("ab") as opened:
            opened.write(json.dumps(row).encode() + b"\n")
    except OSError:
        if file.exists():
            os.truncate(file, start)
        raise


def _column(values: Sequence[Value]) -> "pa.Array":
    import pyarrow as pa

    if any(isinstance(value, str) for value in values):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int) for value in present):
        return pa.array(values, pa.int64())
    return pa.array([None if value is None else float(value) for value in values], pa.float64())
