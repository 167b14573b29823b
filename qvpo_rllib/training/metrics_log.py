"""The metrics of a run, and the table and the curves that are made of them.

    metrics.jsonl      one row per line; the only source of the other two
    metrics.parquet    the same rows as columns, written by `compact`
    tensorboard/       every numeric value of every row, x = env steps

Rows are appended: a line cut short by a crash is ignored by readers, and removed by `repair`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qvpo_rllib.files import replacing, write_atomically
from qvpo_rllib.training.rows import Row, Value, plain_value

if TYPE_CHECKING:
    import pyarrow as pa
    from torch.utils.tensorboard import SummaryWriter


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
        """Returns all whole rows, oldest first.

        Raises:
            ValueError: a line before the last one is damaged.
        """
        return self._read()[0]

    def repair(self) -> None:
        """Removes a last line that a crash cut short."""
        whole_bytes = self._read()[1]
        if self._file.exists():
            os.truncate(self._file, whole_bytes)

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

    def _read(self) -> tuple[list[Row], int]:
        """Returns the whole rows, and how many bytes of the file they take."""
        rows: list[Row] = []
        whole_bytes = 0
        lines = self._file.read_bytes().splitlines(keepends=True) if self._file.exists() else []
        for index, line in enumerate(lines):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict):
                if index < len(lines) - 1:
                    raise ValueError(
                        f"Line {index + 1} of {str(self._file)!r} is damaged: {line[:60]!r} is not "
                        "a JSON object, and is not the last line. Delete the line to go on without "
                        "it."
                    )
                break
            rows.append(row)
            whole_bytes += len(line)
        return rows, whole_bytes


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
