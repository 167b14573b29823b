"""Stepping many environments in one flat loop, with columns instead of objects."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.core.errors import NonFiniteError

# [B, O] → [B, A] in [-1, 1], and their Q [B] if it is known
Act = Callable[[NDArray[np.float32]], tuple[NDArray[np.floating], NDArray[np.floating] | None]]


class Hooks(Protocol):
    """What wants to know of episodes as they go, by environment."""

    def start(self, i: int, reset: Callable[[], Any]) -> Any: ...
    def step(self, i: int, reward: float) -> None: ...
    def end(self, i: int) -> dict[str, Any]: ...


class NoHooks:
    """The default: nobody does."""

    def start(self, i: int, reset: Callable[[], Any]) -> Any:
        return reset()

    def step(self, i: int, reward: float) -> None:
        pass

    def end(self, i: int) -> dict[str, Any]:
        return {}


class Episode(NamedTuple):
    """A finished episode."""

    episode_return: float  # undiscounted sum of rewards
    length: int  # env steps
    extras: dict[str, Any]  # what the hooks collected
    terminated: bool  # or cut off by a time limit
    rewards: list[float]
    q: list[float]  # of the actions taken; empty where it is not known


def check_finite(value: Any, quantity: str, where: str, env_step: int) -> None:
    """Raises `NonFiniteError` naming environment, step and quantity."""
    if not np.isfinite(value).all():
        raise NonFiniteError(
            f"{where}: non-finite {quantity} at step {env_step} of the episode: {value}. Training "
            "stops here; the last checkpoint is untouched. Check the environment's physics and "
            "reward, or lower the learning rates if an action or a loss is not finite."
        )


def run_episodes(
    envs: Sequence[gym.Env[Any, Any]],
    act: Act,
    scale: ActionScale,
    seeds: Sequence[int],
    name: str,
    hooks: Hooks | None = None,
) -> list[Episode]:
    """Plays one whole episode per seed and returns them in the order of the seeds.

    Environment i has a quota, episodes i, i + E, i + 2E, …: stopping at the first N that finish
    would favour short episodes.
    """
    hooks = hooks or NoHooks()
    results: dict[int, Episode] = {}
    current = {i: i for i in range(min(len(envs), len(seeds)))}  # environment → episode
    obs = {i: _reset(envs, i, seeds[i], name, hooks) for i in current}
    rewards: dict[int, list[float]] = {i: [] for i in current}
    predicted: dict[int, list[float]] = {i: [] for i in current}
    while current:
        live = list(current)
        actions, q = act(np.stack([obs[i] for i in live]))
        for row, i in enumerate(live):
            check_finite(actions[row], "action", name, len(rewards[i]))
            next_obs, reward, terminated, truncated, _ = envs[i].step(scale.to_env(actions[row]))
            rewards[i].append(float(reward))
            check_finite(next_obs, "observation", name, len(rewards[i]))
            check_finite(reward, "reward", name, len(rewards[i]))
            if q is not None:
                predicted[i].append(float(q[row]))
            hooks.step(i, float(reward))
            obs[i] = np.asarray(next_obs, dtype=np.float32)
            if terminated or truncated:
                results[current[i]] = Episode(
                    sum(rewards[i]),
                    len(rewards[i]),
                    hooks.end(i),
                    bool(terminated),
                    rewards[i],
                    predicted[i],
                )
                current[i] += len(envs)
                if current[i] >= len(seeds):
                    del current[i]
                    continue
                obs[i] = _reset(envs, i, seeds[current[i]], name, hooks)
                rewards[i], predicted[i] = [], []
    return [results[episode] for episode in range(len(seeds))]


def _reset(
    envs: Sequence[gym.Env[Any, Any]], i: int, seed: int, name: str, hooks: Hooks
) -> NDArray[np.float32]:
    obs, _ = hooks.start(i, lambda: envs[i].reset(seed=seed))
    check_finite(obs, "observation", name, 0)
    return np.asarray(obs, dtype=np.float32)


# Of a truncated episode only those states count after which what the time limit cut off would
# weigh less than this.
CUT_OFF_WEIGHT = 0.05


class ValueBias(NamedTuple):
    """Means over an episode's states."""

    predicted: float  # min Q(s_t, a_t)
    observed: float  # Σ_k γ^k r_{t+k}


def value_bias(
    q: NDArray[np.floating], rewards: NDArray[np.floating], terminated: bool, gamma: float
) -> ValueBias | None:
    """Predicted Q and observed discounted return of one episode's states (REDQ, Chen et al. 2021).

    Args:
        q, rewards: [length], of the actions taken.
        terminated: whether the episode's return really ended; otherwise a time limit cut it off,
            and its last states, whose observed return is only a part, are left out.

    Returns:
        None where a time limit leaves no state.
    """
    length = len(rewards)
    observed, following = np.empty(length), 0.0
    for t in reversed(range(length)):
        following = float(rewards[t]) + gamma * following
        observed[t] = following
    if not terminated and gamma > 0:
        length -= math.ceil(math.log(CUT_OFF_WEIGHT) / math.log(gamma)) - 1
    if length < 1:
        return None
    return ValueBias(float(np.mean(q[:length])), float(observed[:length].mean()))
