"""A run directory whose checkpoints say what they should hold, for the tests of both."""

import hashlib
import json
from pathlib import Path

from qvpo_rllib.training.run_directory import RunDirectory

CONFIG = {
    "algo": "qvpo", "env": "Ant-v5", "preset": "default", "seed": 1, "env_steps": 100,
    "eval_interval": 50, "num_env_runners": 0, "num_envs_per_env_runner": 1, "num_gpus": 0,
    "hyperparameters": {"hidden": [16, 16], "tau": 0.005},
}  # fmt: skip
COMMAND = ["qvpo", "train", "--env", "Hopper-v5"]
REPLAY = "replay.arrow"


def prune(directory: Path) -> None:
    (directory / REPLAY).unlink(missing_ok=True)


def commit(run: RunDirectory, step: int) -> Path:
    """A checkpoint that says which was the best when it was saved, with a checksum of its data."""
    best_step = step - step % 3

    def write(directory: Path) -> None:
        data = step.to_bytes(8, "little") * 5000
        (directory / REPLAY).write_bytes(data)
        (directory / "weights").mkdir()
        (directory / "weights" / "actor").write_bytes(data)
        state = {"step": step, "best_step": best_step, "sha": hashlib.sha256(data).hexdigest()}
        (directory / "state.json").write_text(json.dumps(state))

    return run.commit_checkpoint(
        step, write, best=float(step) if step == best_step else None, prune=prune
    )


def check_whole(run: RunDirectory) -> int:
    """Both names point to whole checkpoints that agree, and nothing else is kept. `last`'s step."""
    last, best = run.checkpoint("last"), run.checkpoint("best")
    states = {}
    for name, directory in (("last", last), ("best", best)):
        states[name] = json.loads((directory / "state.json").read_text())
        data = (directory / "weights" / "actor").read_bytes()
        assert hashlib.sha256(data).hexdigest() == states[name]["sha"]
    assert (last / REPLAY).read_bytes() == (last / "weights" / "actor").read_bytes()
    assert states["best"]["step"] == states["last"]["best_step"]
    kept = {entry.name for entry in (run.path / "checkpoints").iterdir()}
    assert kept == {"last", "best", last.name, best.name}
    return int(states["last"]["step"])


def reopen(run: RunDirectory) -> RunDirectory:
    return RunDirectory.open(run.path, [*COMMAND, "--resume"])
