"""`qvpo bench snapshot`: writing a full replay to disk, then what is new, and reading it back."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from qvpo_rllib.bench.sizes import TASKS, Task
from qvpo_rllib.checkpoints.replay_files import ReplayFiles, Segment, check_segments, read_segments
from qvpo_rllib.core.replay import ReplayBuffer, Transitions, replay_bytes
from qvpo_rllib.files import sync

CHUNK = 10_000  # transitions


def run(
    *, tasks: Sequence[str], capacity: int, increment: int, directory: Path | None, repeats: int
) -> Iterator[dict[str, Any]]:
    """Rows "full", "increment" and "load" of a full replay, with the file system's `fsync`.

    Every repetition writes the full snapshot anew, adds `increment` transitions, writes the next
    one, which shares the rest with the first, and reads that back with all its checks.

    Args:
        directory: under which a temporary one is made; the system's if None.
    """
    for name in tasks:
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            yield from _rows(name, capacity, increment, Path(scratch), repeats)


def _rows(
    name: str, capacity: int, increment: int, scratch: Path, repeats: int
) -> Iterator[dict[str, Any]]:
    task = TASKS[name]
    process = psutil.Process()
    # What PyTorch takes once, at first use, is not the replay's.
    _add(ReplayBuffer(CHUNK, task.obs_dim, task.act_dim, seed=0, device="cpu"), task, CHUNK)
    before = process.memory_info().rss
    replay = ReplayBuffer(capacity, task.obs_dim, task.act_dim, seed=0, device="cpu")
    _add(replay, task, capacity)
    taken = process.memory_info().rss - before
    announced = replay_bytes(capacity, task.obs_dim, task.act_dim)
    times: dict[str, list[float]] = {"full": [], "increment": [], "load": []}
    written: dict[str, int] = {}
    for _ in range(repeats):
        files = ReplayFiles()
        first, second = scratch / "first", scratch / "second"

        def save(place: Path, files: ReplayFiles = files) -> list[Segment]:
            segments = files.write(place, replay)
            sync(place)
            files.link_from(place, segments)
            return segments

        seconds, segments = _timed(lambda place=first: save(place))  # type: ignore[misc]
        times["full"].append(seconds)
        written["full"] = sum(s.num_bytes for s in segments)
        _add(replay, task, increment)
        seconds, later = _timed(lambda place=second: save(place))  # type: ignore[misc]
        times["increment"].append(seconds)
        old = {s.file for s in segments}
        written["increment"] = sum(s.num_bytes for s in later if s.file not in old)
        seconds, _ = _timed(lambda place=second, held=later: _load(place, held, replay))  # type: ignore[misc]
        times["load"].append(seconds)
        written["load"] = sum(s.num_bytes for s in later)
        shutil.rmtree(first)
        shutil.rmtree(second)
    for operation, seconds_of in times.items():
        yield {
            "task": name,
            "operation": operation,
            "transitions": {"full": capacity, "increment": increment, "load": capacity}[operation],
            "megabytes": written[operation] / 1e6,
            "seconds": float(np.median(seconds_of)),
            "seconds_range": [min(seconds_of), max(seconds_of)],
            "memory_share": taken / announced,
        }


def _add(replay: ReplayBuffer, task: Task, count: int) -> None:
    generator = torch.Generator().manual_seed(replay.num_added)
    shapes = ((task.obs_dim,), (task.act_dim,), (), (task.obs_dim,), ())
    for start in range(0, count, CHUNK):
        rows = min(CHUNK, count - start)
        replay.add(Transitions(*(torch.rand(rows, *s, generator=generator) for s in shapes)))


def _load(place: Path, segments: list[Segment], replay: ReplayBuffer) -> None:
    check_segments(place, segments)
    replay.load(replay.state_dict(), read_segments(place, segments, replay.oldest))


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result
