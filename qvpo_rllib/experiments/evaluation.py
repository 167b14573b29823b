"""Evaluating a checkpoint, without a cluster: the code behind `qvpo evaluate`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.policy.policy import Policy

from qvpo_rllib.checkpoint import read_metadata
from qvpo_rllib.core.seeding import Stream, episode_seeds, spawn_seed
from qvpo_rllib.experiments.plan import check_environment
from qvpo_rllib.policy import QVPOTorchPolicy
from qvpo_rllib.rollout import Episode, Hooks, run_episodes
from qvpo_rllib.spaces import action_scale

MAX_ENVS = 10


@dataclass(frozen=True)
class Evaluation:
    """The episodes of one evaluation."""

    env: str
    k: int
    seed: int
    checkpoint: str
    episodes: list[Episode]

    @property
    def mean(self) -> float:
        return float(np.mean([e.episode_return for e in self.episodes]))

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return float(np.std([e.episode_return for e in self.episodes]))

    def to_dict(self) -> dict[str, Any]:
        return {
            "env": self.env,
            "checkpoint": self.checkpoint,
            "k": self.k,
            "seed": self.seed,
            "episodes": len(self.episodes),
            "return_mean": self.mean,
            "return_std": self.std,
            "returns": [e.episode_return for e in self.episodes],
            "lengths": [e.length for e in self.episodes],
        }


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or a run directory's best (else its last)."""
    path = path.expanduser().resolve()
    for name in ("best", "last"):
        if (path / "checkpoints" / name).is_dir():
            return (path / "checkpoints" / name).resolve()
    return path


def evaluate_checkpoint(
    path: Path,
    *,
    episodes: int = 10,
    k: int | None = None,
    seed: int = 0,
    record: Callable[[gym.Env[Any, Any], str], Hooks] | None = None,
) -> Evaluation:
    """Plays whole episodes with the best of k actions, scaled as in training.

    Loading a checkpoint unpickles it, which runs code: load only your own.

    Args:
        path: a checkpoint or a run directory.
        k: actions drawn per state; the checkpoint's `k_eval` if None.
        seed: of environments and diffusion noise.
        record: given the environment, which then renders ("rgb_array"), and its id, returns what
            watches it. The episodes are then played one after the other.

    Raises:
        ValueError: no QVPO checkpoint, of another format, or its environment is missing.
    """
    for name, value, least in (("episodes", episodes, 1), ("k", k, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} is not allowed: it must be {least} or more.")
    directory = find_checkpoint(path)
    metadata = read_metadata(directory)
    env_id = metadata["env"]
    check_environment(env_id, metadata["env_config"])
    policy = Policy.from_checkpoint(str(directory / "policies" / "default_policy"))
    assert isinstance(policy, QVPOTorchPolicy)
    rendering = {} if record is None else {"render_mode": "rgb_array"}
    make = functools.partial(gym.make, env_id, **(metadata["env_config"] or {}) | rendering)
    envs = [make() for _ in range(min(episodes, MAX_ENVS if record is None else 1))]
    shapes = [envs[0].observation_space.shape[0], envs[0].action_space.shape[0]]
    if shapes != metadata["shapes"]:
        raise ValueError(
            f"{env_id} has observation and action sizes {shapes} here, but the checkpoint was "
            f"trained on {metadata['shapes']}."
        )
    k = policy.hp.k_eval if k is None else k
    generator = torch.Generator(device=policy.device)
    generator.manual_seed(spawn_seed(seed, Stream.EVALUATION, 0, 1))
    try:
        finished = run_episodes(
            envs,
            lambda obs: policy.act(obs, k, generator),
            action_scale(envs[0].action_space),
            episode_seeds(seed, 0, episodes),
            env_id,
            record(envs[0], env_id) if record is not None else None,
        )
    finally:
        for env in envs:
            env.close()
    return Evaluation(env_id, k, seed, str(directory), finished)
