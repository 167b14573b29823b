"""`qvpo bench snapshot`: writing a full replay to disk, then what is new, and reading it back."""

import shutil
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qvpo_rllib.bench.learner import random_transitions
from qvpo_rllib.bench.options import Row, add_tasks, positive
from qvpo_rllib.bench.sizes import TASKS, Task

if TYPE_CHECKING:
    from qvpo_rllib.core.replay import ReplayBuffer

HELP = "the replay to disk and back"
COLUMNS = {
    "task": "task",
    "operation": "operation",
    "transitions": "transitions",
    "megabytes": "MB",
    "seconds": "seconds",
    "memory_share": "memory/announced",
}
CHUNK = 10_000  # transitions
T = TypeVar("T")


def add_arguments(parser: ArgumentParser) -> None:
    add_tasks(parser)
    parser.add_argument("--capacity", type=positive, default=1_000_000, metavar="N")
    parser.add_argument(
        "--increment", type=positive, default=50_000, metavar="N", help="new transitions"
    )
    parser.add_argument("--directory", type=Path, metavar="DIR", help="on the disk to measure")


def run(options: Namespace) -> Iterator[Row]:
    """Yields rows "full", "increment" and "load" of a full replay, with the file system's `fsync`.

    Every repetition writes the full snapshot anew, adds `increment` transitions, writes the next
    one, which shares the rest with the first, and reads that back with all its checks. The files
    lie in a temporary directory under `directory`, or under the system's.
    """
    for name in options.task:
        with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
            yield from _rows(name, options, Path(scratch))


def _rows(name: str, options: Namespace, scratch: Path) -> Iterator[Row]:
    import psutil

    from qvpo_rllib.bench.timing import Times
    from qvpo_rllib.checkpoints.replay_files import (
        ReplayFiles,
        Segment,
        check_segments,
        read_segments,
    )
    from qvpo_rllib.core.replay import ReplayBuffer, replay_bytes
    from qvpo_rllib.files import sync

    task, capacity = TASKS[name], options.capacity
    process = psutil.Process()
    # What PyTorch takes once, at first use, is not the replay's.
    _add(ReplayBuffer(CHUNK, task.obs_dim, task.act_dim, seed=0, device="cpu"), task, CHUNK)
    before = process.memory_info().rss
    replay = ReplayBuffer(capacity, task.obs_dim, task.act_dim, seed=0, device="cpu")
    _add(replay, task, capacity)
    taken = process.memory_info().rss - before
    first, second = scratch / "first", scratch / "second"

    def save(files: ReplayFiles, place: Path) -> list[Segment]:
        segments = files.write(place, replay)
        sync(place)
        files.link_from(place, segments)
        return segments

    def load(segments: list[Segment]) -> None:
        check_segments(second, segments)
        replay.load(replay.state_dict(), read_segments(second, segments, replay.oldest))

    times: dict[str, list[float]] = {"full": [], "increment": [], "load": []}
    for _ in range(options.repeats):
        files = ReplayFiles()
        old = _timed(times["full"], save, files, first)
        _add(replay, task, options.increment)
        new = _timed(times["increment"], save, files, second)
        _timed(times["load"], load, new)
        shutil.rmtree(first)
        shutil.rmtree(second)
    shared = {segment.file for segment in old}
    operations = {
        "full": (capacity, old),
        "increment": (options.increment, [s for s in new if s.file not in shared]),
        "load": (capacity, new),
    }
    for operation, (count, segments) in operations.items():
        yield {
            "task": name,
            "operation": operation,
            "transitions": count,
            "megabytes": sum(segment.num_bytes for segment in segments) / 1e6,
            **Times(times[operation]).columns("seconds"),
            "memory_share": taken / replay_bytes(capacity, task.obs_dim, task.act_dim),
        }


def _add(replay: "ReplayBuffer", task: Task, count: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(replay.num_added)
    for start in range(0, count, CHUNK):
        replay.add(random_transitions(task, min(CHUNK, count - start), generator))


def _timed(seconds: list[float], call: Callable[..., T], *arguments: object) -> T:
    """Returns what the call returns, and adds the time that it took to `seconds`."""
    start = time.perf_counter()
    result = call(*arguments)
    seconds.append(time.perf_counter() - start)
    return result
