"""A checkpoint that is overwritten is whole at every moment, whatever kills the process."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qvpo_rllib.checkpoints import metadata as checkpoint
from qvpo_rllib.checkpoints.replay_files import ReplayFiles, Segment, check_segments, read_segments
from qvpo_rllib.checkpoints.staging import committed, staged
from qvpo_rllib.core.replay import ReplayBuffer, Transitions

KILLS = 60


class Saver:
    """Saves a replay that grows, and files that carry the number of the save, to one directory."""

    def __init__(self, target: Path, step: int = 0) -> None:
        self.target, self.step = target, step
        self.replay = ReplayBuffer(64, 3, 1, seed=0, device="cpu")
        self.files = ReplayFiles()

    def collect(self) -> None:
        self.step += 1
        reward = torch.full((9,), float(self.step))
        obs = reward[:, None].expand(-1, 3)
        self.replay.add(Transitions(obs, reward[:, None], reward, obs, reward))

    def save(self) -> None:
        self.collect()
        with staged(self.target) as directory:
            (directory / "policies").mkdir()
            for name in ("algorithm_state.pkl", "policies/state.pkl"):
                (directory / name).write_bytes(self.step.to_bytes(4, "little") * 3000)
            segments = self.files.write(directory / "replay", self.replay)
            state = checkpoint.encode_replay_state(self.replay.state_dict())
            described = {"segments": [s.to_dict() for s in segments]}
            checkpoint.Metadata(
                algorithm="", env="", env_config={}, shapes=[], action_box=[], seed=0,
                hyperparameters={}, fixed_by_checkpoint=[], ledger={"done": self.step},
                replay=state | described,
            ).write(directory)  # fmt: skip
        self.files.link_from(self.target / "replay", segments)


def saved_step(target: Path) -> int:
    """The number of the checkpoint in `target`, whose every file is whole and of that save."""
    directory = committed(target)
    metadata = checkpoint.Metadata.read(directory)
    metadata.check_files(directory)
    segments = [Segment(**s) for s in metadata.replay["segments"]]
    check_segments(directory / "replay", segments)
    step = int(metadata.ledger["done"])
    for name in ("algorithm_state.pkl", "policies/state.pkl"):
        assert (directory / name).read_bytes() == step.to_bytes(4, "little") * 3000
    added = metadata.replay["num_added"]
    parts = read_segments(directory / "replay", segments, max(0, added - 64))
    rewards = torch.cat([part.reward for part in parts])
    assert added == 9 * step
    assert rewards.tolist() == [1 + i // 9 for i in range(max(0, added - 64), added)]
    return step


def kill_many_times(target: Path) -> None:
    """In a process of its own: forks savers and kills them. Prints the steps that survived."""
    import signal
    import time

    saver = Saver(target)
    saver.save()
    start = time.perf_counter()
    saver.save()  # the first one took longer
    save_s = time.perf_counter() - start
    moments, survived = random.Random(0), []
    # On a busy machine few saves end before the kill: then there are more kills.
    while len(survived) < KILLS or (saved_step(target) <= 3 and len(survived) < 3 * KILLS):
        step = saved_step(target)
        parent, child = os.getpid(), os.fork()
        if child == 0:
            saver = Saver(target)
            while saver.step < step:  # the same replay again, then new saves
                saver.collect()
            while os.getppid() == parent:  # which may be killed too
                saver.save()
            os._exit(0)
        time.sleep(moments.uniform(0.0, 2 * save_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        survived.append(saved_step(target))
    print(json.dumps(survived))


def test_kills_at_many_moments_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "checkpoint")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    survived = json.loads(result.stdout)
    assert len(survived) >= KILLS
    assert survived == sorted(survived)
    assert survived[-1] > 3  # there were saves between the kills


def test_a_crash_before_any_single_file_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    survivors = set()
    for crash_at in itertools.count():
        saver = Saver(tmp_path / str(crash_at))
        for _ in range(3):
            saver.save()
        countdown = itertools.count(crash_at, -1)
        with monkeypatch.context() as patch:
            for name in ("mkdir", "fsync", "rename", "replace", "link", "unlink", "rmdir"):
                real = getattr(os, name)

                def crashing(*args: Any, _real: Any = real, _n: Any = countdown, **kw: Any) -> Any:
                    if next(_n) <= 0:
                        raise Crash
                    return _real(*args, **kw)

                patch.setattr(os, name, crashing)
            try:
                saver.save()
                crashed = False
            except Crash:
                crashed = True
        if not crashed:
            break
        survivors.add(saved_step(saver.target))
        again = Saver(saver.target)
        again.step, again.replay = saver.step, saver.replay
        again.save()  # the next save cleans up
        assert saved_step(saver.target) == saver.step + 1
        names = {entry.name for entry in saver.target.iterdir()}
        assert names == {"algorithm_state.pkl", "policies", "replay", "qvpo.json"}
    assert crash_at >= 20  # as many operations, at least, were interrupted
    assert survivors == {3, 4}


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    saver = Saver(tmp_path)
    for _ in range(12):
        saver.save()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert saved_step(tmp_path) == 12
    held = json.loads((tmp_path / "qvpo.json").read_text())["replay"]["segments"]
    assert {s["file"] for s in held} == {f.name for f in (tmp_path / "replay").iterdir()}


def test_any_flipped_byte_of_any_file_is_found(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save()
    random.seed(0)
    for file in [f for f in tmp_path.rglob("*") if f.is_file()]:
        content = file.read_bytes()
        for position in random.sample(range(len(content)), 25):
            flipped = bytearray(content)
            flipped[position] ^= 1
            file.write_bytes(flipped)
            if file.name == "qvpo.json" and chr(content[position]).isspace():
                continue  # not a change of what it says
            with pytest.raises(ValueError, match=r"damaged|format"):
                saved_step(tmp_path)
        file.write_bytes(content)
    assert saved_step(tmp_path) == 1


def test_without_its_replay_a_checkpoint_is_whole(tmp_path: Path) -> None:
    Saver(tmp_path).save()
    checkpoint.drop_replay(tmp_path)
    metadata = checkpoint.Metadata.read(tmp_path)
    metadata.check_files(tmp_path)
    assert metadata.replay["segments"] is None
    assert not (tmp_path / "replay").exists()


if __name__ == "__main__":
    kill_many_times(Path(sys.argv[1]))
