"""Plays whole episodes in several environments at once, for evaluations."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.core.errors import NonFiniteError

# Observations [B, O] → actions [B, A] in [-1, 1], and their Q [B] if it is known.
Act = Callable[[NDArray[np.float32]], tuple[NDArray[np.floating], NDArray[np.floating] | None]]


Reset = Callable[[], tuple[Any, dict[str, Any]]]  # of an environment: observation and info


class Hooks(Protocol):
    """Watches the episodes of environments, which it knows by their index."""

    def start(self, i: int, reset: Reset) -> tuple[Any, dict[str, Any]]:
        """Starts an episode: calls `reset` once and returns what it returned."""
        return reset()

    def step(self, i: int, reward: float) -> None:
        """Is called after every step."""

    def end(self, i: int) -> dict[str, Any]:
        """Ends an episode. Returns fields of `RolloutMetrics` beside its length and return."""
        return {}


class NoHooks(Hooks):
    """Watches nothing."""

    def step(self, i: int, reward: float) -> None:
        pass


class Episode(NamedTuple):
    """A finished episode."""

    episode_return: float  # undiscounted sum of rewards
    length: int  # env steps
    extras: dict[str, Any]  # of `Hooks.end`
    terminated: bool  # else a time limit cut it off
    rewards: list[float]
    q: list[float]  # of the actions taken; empty if it is not known


def check_finite(
    value: NDArray[np.floating] | float, quantity: str, where: str, env_step: int
) -> None:
    """Raises `NonFiniteError` with environment, step and quantity if a number is not finite."""
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
    """Returns one whole episode per seed, in the order of the seeds.

    Environment i plays a quota of them, i, i + E, i + 2E, …: if playing ended with the first N that
    finish, short episodes would be favoured.

    Args:
        name: of the environment, in messages.

    Raises:
        NonFiniteError: an observation, reward or action is NaN or infinite.
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


# In a truncated episode only those states count for which the discount of what the time limit cut
# off is below this.
CUT_OFF_WEIGHT = 0.05


class ValueBias(NamedTuple):
    """Means over an episode's states."""

    predicted: float  # min Q(s_t, a_t)
    observed: float  # Σ_k γ^k r_{t+k}


def value_bias(
    q: NDArray[np.floating], rewards: NDArray[np.floating], terminated: bool, gamma: float
) -> ValueBias | None:
    """Returns predicted Q and observed return of an episode's states (REDQ, Chen et al. 2021).

    Args:
        q, rewards: [length], of the actions taken.
        terminated: whether the episode's return really ended. Otherwise a time limit cut it off,
            and the last states, only a part of whose return was observed, are left out.

    Returns:
        Means over the states, or None if a time limit leaves none.
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
