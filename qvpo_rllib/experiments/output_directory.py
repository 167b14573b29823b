"""Where an experiment's results go: a directory of its own, in which nothing is overwritten."""

import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qvpo_rllib.experiments.run_directory import write_atomically

PACKAGES = ("qvpo_rllib", "torch", "numpy")


class OutputDirectory:
    """A new directory for the files of one experiment; removed again if nothing came into it.

    Args:
        path: must not exist, or be an empty directory.

    Raises:
        ValueError: it holds something, is a file, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        if os.path.lexists(self.path):
            if not self.path.is_dir():
                self._refuse("is a file")
            if any(self.path.iterdir()):
                self._refuse("is a directory with files in it")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"The directory {str(self.path)!r} cannot be made: {error}. Give another --out."
            ) from error
        if not os.access(self.path, os.W_OK):
            self._refuse("cannot be written to")

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"Cannot write results to {str(self.path)!r}: it {what}. Give another --out, which "
            "must not exist yet or be empty; nothing was changed."
        )

    def __enter__(self) -> "OutputDirectory":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes `rows`, which share their keys, as the Parquet file `name`."""
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), file)
        write_atomically(self.path / name, file.getvalue())

    def write_summary(self, name: str, summary: Mapping[str, Any]) -> None:
        """Writes `summary` as the JSON file `name`, with the versions that made it."""
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        record = {**summary, "versions": {"python": platform.python_version(), **versions}}
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        write_atomically(self.path / name, text.encode())
