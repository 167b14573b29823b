"""The replay in files: Arrow segments that are written once and shared by checkpoints.

A segment is an Arrow IPC file with the transitions number `first` to `first + rows - 1`, counted
from the first that was ever added. It never changes, so a checkpoint links the segments that an
earlier one has written and writes only what is new: each checkpoint is complete in itself, and the
file system frees a segment with the last checkpoint that has it.
"""

import itertools
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.files import FileRecord, check_file, record_of

# A segment stays until its last transition is overwritten: small against a replay of 1e6.
MAX_ROWS = 65_536
# Neighbours that are smaller together are merged, so that frequent checkpoints leave few files.
MERGED_ROWS = 32_768


@dataclass(frozen=True)
class Segment:
    """A file of transitions, as `qvpo.json` describes it."""

    file: str
    first: int
    rows: int
    num_bytes: int
    digest: str

    @property
    def last(self) -> int:
        """One past the number of its last transition."""
        return self.first + self.rows

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ReplayFiles:
    """Writes a replay into one checkpoint after the other, and only what is new each time."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._directory: Path | None = None
        # Size and time of change of each file: a file that is no longer ours is not linked.
        self._stamps: dict[str, tuple[int, int]] = {}

    def write(self, directory: Path, replay: ReplayBuffer) -> list[Segment]:
        """Writes all that `replay` holds to `directory`, which is empty or absent.

        It links the files of the last checkpoint (see `link_from`) where they still are, and writes
        them again where they are not. Returns the segments, oldest first.
        """
        directory.mkdir(parents=True, exist_ok=True)
        kept = [s for s in self._segments if s.last > replay.oldest]
        written = kept[-1].last if kept else replay.oldest
        while kept and _worth_merging(kept[-1], replay.num_added - written):
            written = max(kept.pop().first, replay.oldest)
        segments = [s for s in kept if self._link(s, directory)]
        if len(segments) < len(kept):
            segments, written = [], replay.oldest
        for first in range(written, replay.num_added, MAX_ROWS):
            last = min(first + MAX_ROWS, replay.num_added)
            segments.append(_write_segment(directory, replay, first, last))
        return segments

    def link_from(self, directory: Path, segments: Sequence[Segment]) -> None:
        """Names the files that the next `write` may link: those of a whole checkpoint."""
        self._directory, self._segments = directory, list(segments)
        self._stamps = {s.file: _stamp(directory / s.file) for s in segments}

    def moved(self, directory: Path) -> None:
        """Notes that the directory of the last checkpoint has been renamed."""
        self._directory = directory

    def reset(self) -> None:
        """Forgets all files: the transitions' numbers have changed."""
        self._directory, self._segments, self._stamps = None, [], {}

    def _link(self, segment: Segment, directory: Path) -> bool:
        if self._directory is None:
            return False
        source, place = self._directory / segment.file, directory / segment.file
        try:
            if _stamp(source) != self._stamps[segment.file]:
                return False
            os.link(source, place)
        except OSError:  # gone, on another file system, or one without links
            return False
        return True


def check_segments(directory: Path, segments: Sequence[Segment]) -> None:
    """Raises `ValueError` unless every segment's file is whole and holds what it should."""
    for segment in segments:
        check_file(directory / segment.file, FileRecord(segment.num_bytes, segment.digest))
    for one, following in itertools.pairwise(segments):
        if one.last != following.first:
            raise ValueError(
                f"The replay in {str(directory)!r} has a gap between {one.file} and "
                f"{following.file}; use another checkpoint."
            )


def read_segments(directory: Path, segments: Sequence[Segment], first: int) -> list[Transitions]:
    """Returns the transitions from number `first` on, oldest first. Do not write to them: they are
    memory-mapped.

    Raises:
        ValueError: a file is no Arrow file of transitions.
    """
    return [
        Transitions(*(column[max(0, first - s.first) :] for column in _read(directory, s)))
        for s in segments
    ]


def _worth_merging(segment: Segment, new_rows: int) -> bool:
    """Tells whether to merge: only with a larger part, so that no row is written again often."""
    return 0 < segment.rows <= new_rows and segment.rows + new_rows <= MERGED_ROWS


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _write_segment(directory: Path, replay: ReplayBuffer, first: int, last: int) -> Segment:
    file = directory / f"{first:012d}-{last:012d}.arrow"
    file.unlink(missing_ok=True)  # never write into a file that another checkpoint shares
    widths = {name: tuple(c.shape[1:]) for name, c in replay.columns._asdict().items()}
    schema = pa.schema([(name, _arrow_type(width)) for name, width in widths.items()])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for part in replay.rows(first, last):
            arrays = [_arrow_array(column.cpu().numpy()) for column in part]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return Segment(file.name, first, last - first, *record_of(file))


def _read(directory: Path, segment: Segment) -> Transitions:
    file = directory / segment.file
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        if table.schema.names != list(Transitions._fields):
            raise pa.ArrowInvalid(f"its columns are {table.schema.names}")
        if table.num_rows != segment.rows:
            raise pa.ArrowInvalid(f"it has {table.num_rows} rows instead of {segment.rows}")
        columns = [_numpy(table.column(name)) for name in Transitions._fields]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"The replay {str(file)!r} is damaged ({error}); use another checkpoint."
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to them
        return Transitions(*(torch.from_numpy(column) for column in columns))


def _arrow_type(width: tuple[int, ...]) -> pa.DataType:
    return pa.list_(pa.float32(), width[0]) if width else pa.float32()


def _arrow_array(column: NDArray[np.float32]) -> pa.Array:
    if column.ndim == 1:
        return pa.array(column)
    return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), column.shape[1])


def _numpy(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A view; a copy only for a segment that was written across the ring's end."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_fixed_size_list(array.type):
        flat: NDArray[np.float32] = array.flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(-1, array.type.list_size)
    values: NDArray[np.float32] = array.to_numpy(zero_copy_only=True)
    return values
