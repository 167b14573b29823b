"""Saves a rollout worker in mid-episode: environments, random streams, episode statistics."""

import pickle
import random
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from ray import cloudpickle

from qvpo_rllib.checkpoints import env_state
from qvpo_rllib.core.seeding import restore_generator
from qvpo_rllib.rollout.worker import ColumnarRolloutWorker

# Every MuJoCo environment brings its model, half a megabyte that is the same for all.
CODEC = "zstd"
LENGTH_BYTES = 8  # in front of the compressed state: how long it is unpacked


class Captured(NamedTuple):
    """A worker's state, on its way to a file."""

    worker_index: int
    state: bytes
    not_captured: list[str]  # a text for each environment whose state could not be taken


def capture(worker: ColumnarRolloutWorker) -> Captured:
    """Returns all that the worker's next fragments depend on, but the weights it is sent."""
    envs: list[bytes | None] = []
    not_captured = []
    for i, env in enumerate(worker.envs):
        try:
            envs.append(env_state.capture(env))
        except env_state.NotCapturableError as error:
            envs.append(None)
            not_captured.append(f"{_name(worker, i)}: {error}")
    state = {
        "envs": envs,
        "progress": worker.progress(),
        "actions": worker.policy.generator.get_state().cpu(),
        # Environments and callbacks may draw from the process's own generators.
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
    }
    raw = cloudpickle.dumps(state)
    packed = len(raw).to_bytes(LENGTH_BYTES, "little") + pa.compress(raw, CODEC, asbytes=True)
    return Captured(worker.worker_index, packed, not_captured)


def restore(worker: ColumnarRolloutWorker, packed: bytes, env_steps: int) -> list[str]:
    """Restores the worker to where `capture` was called.

    An environment whose state was not captured, or does not fit, starts a new episode.

    Args:
        env_steps: of the run so far; they decide the seeds of new episodes.

    Returns:
        A text for each environment that starts a new episode.
    """
    num_bytes = int.from_bytes(packed[:LENGTH_BYTES], "little")
    state: dict[str, Any] = pickle.loads(
        pa.decompress(packed[LENGTH_BYTES:], num_bytes, CODEC, asbytes=True)
    )
    envs = state["envs"]
    before = len(state["progress"]["lengths"])
    if (len(envs), before) != (len(worker.envs), worker.num_envs):
        worker.restart_streams(env_steps)
        return [
            f"worker {worker.worker_index}: it has {worker.num_envs} environments, but had {before}"
        ]
    worker.set_progress(state["progress"])
    restore_generator(worker.policy.generator, state["actions"])
    new = []
    for i, env in enumerate(envs):
        try:
            if env is None:
                raise env_state.NotCapturableError("its state could not be captured")
            env_state.restore(worker.envs[i], env)
        except env_state.NotCapturableError as error:
            worker.start_episode(i, env_steps)
            new.append(f"{_name(worker, i)}: {error}")
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    return new


def _name(worker: ColumnarRolloutWorker, i: int) -> str:
    which = f"environment {i}" if worker.batch is None else "vector environment"
    return f"worker {worker.worker_index}, {which}"
