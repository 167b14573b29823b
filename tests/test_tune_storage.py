"""A trial's checkpoints lie in its directory from the start, and share what they have in common."""

import os
from pathlib import Path
from typing import Any

import pytest
from ray.train._internal.storage import StorageContext

from qvpo_rllib import QVPO
from qvpo_rllib.checkpoints.run_state import RunState


def replay_of(checkpoint: Any) -> dict[int, int]:
    """Inode → bytes of each file of a checkpoint's replay."""
    files = [file.stat() for file in (Path(checkpoint.path) / "replay").iterdir()]
    return {file.st_ino: file.st_size for file in files}


def test_a_trial_writes_only_what_is_new_since_its_last_checkpoint(
    tiny_config: Any, tmp_path: Path, ray_session: None, monkeypatch: Any
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a checkpoint was written elsewhere, to be copied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    storage = StorageContext(tmp_path, "experiment", trial_dir_name="trial")
    algorithm = QVPO(config=tiny_config(warmup_steps=500), storage=storage)
    algorithm.train()
    algorithm.train()
    first = algorithm.save()
    algorithm.train()
    second = algorithm.save()
    assert [s.metrics["training_iteration"] for s in (first, second)] == [2, 3]
    assert sorted(os.listdir(tmp_path / "experiment" / "trial")) == [
        "checkpoint_000000",
        "checkpoint_000001",
    ]
    old, new = replay_of(first.checkpoint), replay_of(second.checkpoint)
    written = sum(size for inode, size in new.items() if inode not in old)
    assert 0 < written < sum(old.values()) < sum(new.values())

    monkeypatch.undo()
    for saved, steps in ((first, 120), (second, 180)):  # each whole in itself
        found = RunState.read(Path(saved.checkpoint.path), own=algorithm.metadata())
        assert sum(len(t.reward) for t in found.transitions) == steps
    algorithm.restore(second)  # as a trial that goes on: it shares what it found
    assert replay_of(algorithm.save().checkpoint) == new
    algorithm.stop()
