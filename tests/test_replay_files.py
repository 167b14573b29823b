"""The replay in files: what is written, what is shared, and what is refused."""

import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvpo_rllib.checkpoints import replay_files
from qvpo_rllib.checkpoints.replay_files import ReplayFiles, Segment, check_segments, read_segments
from qvpo_rllib.core.replay import ReplayBuffer, Transitions

OBS, ACT = 3, 2


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_files, "MAX_ROWS", 8)
    monkeypatch.setattr(replay_files, "MERGED_ROWS", 4)


def buffer(capacity: int) -> ReplayBuffer:
    return ReplayBuffer(capacity, OBS, ACT, seed=0, device="cpu")


def numbered(first: int, count: int) -> Transitions:
    number = torch.arange(first, first + count, dtype=torch.float32)
    return Transitions(
        number[:, None].expand(-1, OBS),
        number[:, None].expand(-1, ACT) + 0.25,
        number,
        number[:, None].expand(-1, OBS) + 0.5,
        (number % 3 == 0).float(),
    )


def save(files: ReplayFiles, directory: Path, replay: ReplayBuffer) -> list[Segment]:
    segments = files.write(directory, replay)
    files.link_from(directory, segments)
    return segments


def load(directory: Path, segments: list[Segment], like: ReplayBuffer) -> ReplayBuffer:
    check_segments(directory, segments)
    restored = buffer(like.capacity)
    restored.load(like.state_dict(), read_segments(directory, segments, like.oldest))
    return restored


def assert_same(one: ReplayBuffer, other: ReplayBuffer) -> None:
    for a, b in zip(reference.in_order(one), reference.in_order(other), strict=True):
        assert torch.equal(a, b)
    assert one.num_added == other.num_added


def inodes(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in directory.iterdir()}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 30), st.lists(st.integers(0, 20), min_size=1, max_size=8))
def test_every_checkpoint_holds_all_that_the_replay_holds(
    tmp_path_factory: Any, capacity: int, counts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("replay")
    files, replay, first = ReplayFiles(), buffer(capacity), 0
    for i, count in enumerate(counts):
        replay.add(numbered(first, count))
        first += count
        segments = save(files, path / str(i), replay)
        assert {s.file for s in segments} == {f.name for f in (path / str(i)).iterdir()}
        assert_same(load(path / str(i), segments, replay), replay)
        # What is kept beyond the ring is less than one segment.
        assert sum(s.rows for s in segments) < len(replay) + 8


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    files, replay = ReplayFiles(), buffer(40)
    replay.add(numbered(0, 30))
    save(files, tmp_path / "1", replay)
    replay.add(numbered(30, 5))
    save(files, tmp_path / "2", replay)
    old, new = inodes(tmp_path / "1"), inodes(tmp_path / "2")
    assert len(new) == len(old) + 1
    assert old.items() <= new.items()
    replay.add(numbered(35, 14))  # the first eight are overwritten
    save(files, tmp_path / "3", replay)
    newest = inodes(tmp_path / "3")
    assert len(newest.keys() & old.keys()) == len(old) - 1


def test_small_parts_are_merged(tmp_path: Path) -> None:
    files, replay = ReplayFiles(), buffer(1000)
    for i in range(64):
        replay.add(numbered(i, 1))
        segments = save(files, tmp_path / str(i), replay)
        assert len(segments) <= i // 4 + 3
    assert_same(load(tmp_path / "63", segments, replay), replay)


@pytest.mark.parametrize("lost", ["removed", "changed", "no links", "moved"])
def test_what_cannot_be_linked_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    files, replay = ReplayFiles(), buffer(40)
    replay.add(numbered(0, 20))
    segments = save(files, tmp_path / "1", replay)
    victim = tmp_path / "1" / segments[1].file
    if lost == "removed":
        victim.unlink()
    elif lost == "changed":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif lost == "no links":
        monkeypatch.setattr(replay_files.os, "link", _no_links)
    else:
        (tmp_path / "1").rename(tmp_path / "elsewhere")
    before = victim.read_bytes() if victim.exists() else None
    replay.add(numbered(20, 3))
    assert_same(load(tmp_path / "2", save(files, tmp_path / "2", replay), replay), replay)
    # The other checkpoint's files are not touched, shared or not.
    assert before is None or victim.read_bytes() == before


def _no_links(*_: Any) -> None:
    raise OSError("links are not supported")


def test_after_a_restore_files_are_shared_too(tmp_path: Path) -> None:
    replay = buffer(40)
    replay.add(numbered(0, 20))
    segments = save(ReplayFiles(), tmp_path / "1", replay)
    restored, files = load(tmp_path / "1", segments, replay), ReplayFiles()
    files.link_from(tmp_path / "1", segments)
    restored.add(numbered(20, 2))
    save(files, tmp_path / "2", restored)
    assert inodes(tmp_path / "1").items() <= inodes(tmp_path / "2").items()


def damaged_replays(tmp_path: Path) -> tuple[Path, list[Segment]]:
    replay = buffer(40)
    replay.add(numbered(0, 20))
    return tmp_path / "1", ReplayFiles().write(tmp_path / "1", replay)


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    directory, segments = damaged_replays(tmp_path)
    file = directory / segments[1].file
    content = file.read_bytes()
    for position in np.linspace(0, len(content) - 1, 60).astype(int):
        flipped = bytearray(content)
        flipped[position] ^= 4
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match="content has changed"):
            check_segments(directory, segments)


@pytest.mark.parametrize("num_bytes", [0, 1, 700, -1])
def test_a_truncated_file_is_found(tmp_path: Path, num_bytes: int) -> None:
    directory, segments = damaged_replays(tmp_path)
    file = directory / segments[-1].file
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=r"is damaged: it has .* bytes instead of"):
        check_segments(directory, segments)


def test_a_missing_file_and_a_gap_are_found(tmp_path: Path) -> None:
    directory, segments = damaged_replays(tmp_path)
    with pytest.raises(ValueError, match="gap"):
        check_segments(directory, [segments[0], segments[2]])
    (directory / segments[1].file).unlink()
    with pytest.raises(ValueError, match="lacks its file"):
        check_segments(directory, segments)


def test_reading_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    replay = buffer(40)
    replay.add(numbered(0, 40))
    segments = ReplayFiles().write(tmp_path, replay)
    parts = read_segments(tmp_path, segments, 0)
    assert not any(column.is_shared() for part in parts for column in part)
    assert deque(p.reward.shape[0] for p in parts) == deque([8] * 5)


MEASURE_MEMORY = """
import psutil, torch
from qvpo_rllib.core.replay import ReplayBuffer, Transitions, replay_bytes

chunk, sizes = 5_000, (60, 8)
rows = Transitions(*(torch.ones(chunk, *shape) for shape in ((60,), (8,), (), (60,), ())))
ReplayBuffer(chunk, *sizes, seed=0, device="cpu").add(rows)
process = psutil.Process()
before = process.memory_info().rss
replay = ReplayBuffer(200_000, *sizes, seed=0, device="cpu")
for _ in range(40):
    replay.add(rows)
print((process.memory_info().rss - before) / replay_bytes(200_000, *sizes))
"""


def test_a_full_replay_takes_the_memory_that_was_announced() -> None:
    """In a process of its own, which has no freed memory to use again."""
    command = [sys.executable, "-c", MEASURE_MEMORY]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(output) == pytest.approx(1.0, abs=0.05)
