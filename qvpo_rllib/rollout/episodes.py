"""Plays whole episodes in several environments at once, for evaluations."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.core.errors import (
    RAISED_BY_ENVIRONMENT,
    EnvironmentFailure,
    NonFiniteError,
    described,
)
from qvpo_rllib.rollout.env_batch import EnvBatch, info_of
from qvpo_rllib.rollout.environments import MAX_EPISODE_STEPS, has_time_limit
from qvpo_rllib.rollout.outcomes import OutcomeCheck
from qvpo_rllib.rollout.wrapping import env_steps_of

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 30.0  # between two messages of how far an evaluation is

# Observations [B, O] → actions [B, A] in [-1, 1], and their Q [B] if it is known.
Act = Callable[[NDArray[np.float32]], tuple[NDArray[np.floating], NDArray[np.floating] | None]]


Reset = Callable[[], tuple[Any, dict[str, Any]]]  # of an environment: observation and info


def already(obs: NDArray[np.float32], info: dict[str, Any]) -> Reset:
    """Returns the reset of a sub-environment that its vector environment has reset already."""
    return lambda: (obs, info)


class Hooks:
    """Watches environments' episodes, knowing each by its index; this one does nothing."""

    def start(self, i: int, reset: Reset) -> tuple[Any, dict[str, Any]]:
        """Starts an episode: calls `reset` once and returns what it returned."""
        return reset()

    def step(
        self,
        i: int,
        action: NDArray[np.floating],
        obs: NDArray[np.float32],
        reward: float,
        info: dict[str, Any],
    ) -> None:
        """Is called after every step with its action, [A] in [-1, 1], and what came of it."""

    def end(self, i: int) -> dict[str, Any]:
        """Ends an episode. Returns fields of `RolloutMetrics` beside its length and return."""
        return {}

    def fail(self, i: int, error: BaseException) -> None:
        """Drops an episode whose environment raised."""


class Episode(NamedTuple):
    """A finished episode."""

    episode_return: float  # undiscounted sum of rewards
    length: int  # env steps: with `frame_skip` more than `rewards`
    extras: dict[str, Any]  # of `Hooks.end`
    terminated: bool  # else a time limit cut it off
    rewards: list[float]  # of each action
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


def environment_failure(where: str, error: BaseException, env_steps: int) -> EnvironmentFailure:
    """Returns the error for an environment that raised after so many steps of an episode."""
    of_old_gym = isinstance(error, ValueError) and "to unpack (expected 5, got 4)" in str(error)
    advice = ". Its step must return (obs, reward, terminated, truncated, info)"
    return EnvironmentFailure(
        f"{where}: {described(error)} (after {env_steps} steps of the episode)"
        f"{advice if of_old_gym else ''}"
    )


def try_a_step(env: gym.Env[Any, Any] | EnvBatch, where: str) -> None:
    """Resets `env` and takes a step in the middle of its box, to see what it returns.

    Raises:
        UnusableOutcome, EnvironmentFailure: as `run_episodes` does.
    """
    space = env.action_space
    assert isinstance(space, gym.spaces.Box)
    middle = ActionScale(space.low, space.high).to_env(np.zeros(space.shape))
    if isinstance(env, EnvBatch):
        env.reset_all(list(range(env.num_envs)))
        env.step(np.stack([middle] * env.num_envs))
        return
    check, step = OutcomeCheck(env, where), 0
    try:
        first, step = env.reset(seed=0), 1
        second = env.step(middle)
    except RAISED_BY_ENVIRONMENT as error:
        raise environment_failure(where, error, step) from error
    check.reset(first)
    check.step(second, 1)


def run_episodes(
    envs: Sequence[gym.Env[Any, Any]] | EnvBatch,
    act: Act,
    scale: ActionScale,
    seeds: Sequence[int],
    name: str,
    hooks: Hooks | None = None,
    restart: Callable[[int], None] | None = None,
) -> list[Episode]:
    """Returns one whole episode per seed, in the order of the seeds.

    Environment i plays a quota of them, i, i + E, i + 2E, …: if playing ended with the first N that
    finish, short episodes would be favoured. A vector environment is reset with E of the seeds, and
    again with the next ones when each sub-environment has played one episode. An environment that
    declares no time limit is cut off after `MAX_EPISODE_STEPS`.

    Args:
        name: of the environment, in messages.
        restart: replaces an environment in `envs` that raised; the episode begins again, once.

    Raises:
        NonFiniteError: an observation, reward or action is NaN or infinite.
        UnusableOutcome: an environment returned what its spaces or Gymnasium's API rule out.
        EnvironmentFailure: an environment raised anything, twice if it was restarted.
    """
    if isinstance(envs, EnvBatch):
        return _run_rounds(envs, act, scale, seeds, name, hooks or Hooks())
    players = [
        _Player(envs, i, seeds, name, hooks or Hooks(), restart)
        for i in range(min(len(envs), len(seeds)))
    ]
    reported_s = time.monotonic()
    while live := [player for player in players if player.playing]:
        actions, q = act(np.stack([player.obs for player in live]))
        for row, player in enumerate(live):
            check_finite(actions[row], "action", name, len(player.rewards))
            player.step(actions[row], scale, None if q is None else float(q[row]))
        if time.monotonic() - reported_s > REPORT_EVERY_S:
            reported_s = time.monotonic()
            done = sum(len(p.episodes) for p in players)
            _report(name, done, len(seeds), max(len(p.rewards) for p in players))
    _warn_of_cut_off(name, sum(player.cut_off for player in players), len(seeds))
    return [players[i % len(players)].episodes[i // len(players)] for i in range(len(seeds))]


def _report(name: str, done: int, episodes: int, longest: int) -> None:
    logger.info(
        f"{name}: {done} of {episodes} episodes have ended; the longest under way is at step "
        f"{longest:,}."
    )


def _warn_of_cut_off(name: str, cut_off: int, episodes: int) -> None:
    if cut_off:
        logger.warning(
            f"{name}: {cut_off} of {episodes} episodes were cut off after {MAX_EPISODE_STEPS:,} "
            "steps, since the environment declares no time limit. Register it with "
            "max_episode_steps, or wrap it in gymnasium.wrappers.TimeLimit."
        )


def _run_rounds(
    batch: EnvBatch, act: Act, scale: ActionScale, seeds: Sequence[int], name: str, hooks: Hooks
) -> list[Episode]:
    """`run_episodes` in a vector environment: a round is one episode of each sub-environment.

    Those that end first go on, unwatched, until the last has ended: only a reset of all takes
    seeds in every autoreset mode.
    """
    episodes: list[Episode] = []
    cut_off = 0
    limit = math.inf if has_time_limit(batch) else MAX_EPISODE_STEPS
    while len(episodes) < len(seeds):
        own = seeds[len(episodes) : len(episodes) + batch.num_envs]
        for_all = [own[i % len(own)] for i in range(batch.num_envs)]
        round_ = _Round(batch, len(own), for_all, name, hooks, limit)
        reported_s = time.monotonic()
        while round_.live:
            actions, q = act(round_.obs[round_.live])
            round_.step(actions, scale, q)
            if time.monotonic() - reported_s > REPORT_EVERY_S:
                reported_s = time.monotonic()
                done = len(episodes) + len(round_.ended)
                _report(name, done, len(seeds), round_.step_number)
        episodes += [round_.ended[i] for i in range(len(own))]
        cut_off += round_.cut_off
    _warn_of_cut_off(name, cut_off, len(seeds))
    return episodes


class _Round:
    """One episode in each of the first `number` sub-environments of a vector environment.

    Attributes:
        live: sub-environments whose episode is under way; all are at the step `step_number`.
        obs: [E, O], of all sub-environments.
        ended: episodes by sub-environment.
    """

    def __init__(
        self,
        batch: EnvBatch,
        number: int,
        seeds: list[int],
        name: str,
        hooks: Hooks,
        limit: float,
    ) -> None:
        self._batch, self._name, self._hooks, self._limit = batch, name, hooks, limit
        space = batch.action_space
        middle = ActionScale(space.low, space.high).to_env(np.zeros(space.shape))
        self._idle = np.stack([middle] * batch.num_envs)  # actions of those that have ended
        self.live, self.step_number = list(range(number)), 0
        self.ended: dict[int, Episode] = {}
        self.cut_off = 0
        self._rewards: list[list[float]] = [[] for _ in self.live]
        self._q: list[list[float]] = [[] for _ in self.live]
        self.obs, infos = batch.reset_all(seeds)
        for i in self.live:
            check_finite(self.obs[i], "observation", name, 0)
            hooks.start(i, already(self.obs[i], info_of(infos, i)))

    def step(
        self,
        actions: NDArray[np.floating],
        scale: ActionScale,
        q: NDArray[np.floating] | None,
    ) -> None:
        """Takes a step with actions [live, A]; the other sub-environments go on unwatched."""
        check_finite(actions, "action", self._name, self.step_number)
        all_actions = self._idle.copy()
        all_actions[self.live] = scale.to_env(actions)
        step = self._batch.step(all_actions)
        self.step_number += 1
        self.obs = step.obs
        for row, i in enumerate(self.live):
            obs, reward = step.next_obs[i], float(step.rewards[i])
            check_finite(obs, "observation", self._name, self.step_number)
            check_finite(reward, "reward", self._name, self.step_number)
            self._rewards[i].append(reward)
            if q is not None:
                self._q[i].append(float(q[row]))
            self._hooks.step(i, actions[row], obs, reward, step.info(i))
            if step.ended[i] or self.step_number >= self._limit:
                self.cut_off += not step.ended[i]
                self._end(i, bool(step.terminated[i]))
        self.live = [i for i in self.live if i not in self.ended]

    def _end(self, i: int, terminated: bool) -> None:
        rewards, q = self._rewards[i], self._q[i]
        extras = self._hooks.end(i)
        self.ended[i] = Episode(sum(rewards), len(rewards), extras, terminated, rewards, q)


class _Player:
    """Plays the episodes i, i + E, i + 2E, … of `seeds` in environment i of E."""

    def __init__(
        self,
        envs: Sequence[gym.Env[Any, Any]],
        i: int,
        seeds: Sequence[int],
        name: str,
        hooks: Hooks,
        restart: Callable[[int], None] | None,
    ) -> None:
        self.episodes: list[Episode] = []
        self.cut_off = 0
        self._envs, self._i, self._name = envs, i, name
        self._seeds = seeds[i :: len(envs)]
        self._hooks, self._restart = hooks, restart
        self._restarted = -1  # the last episode that began again
        self._check = OutcomeCheck(envs[i], name)
        self._limit = math.inf if has_time_limit(envs[i]) else MAX_EPISODE_STEPS
        self._begin()

    @property
    def playing(self) -> bool:
        return len(self.episodes) < len(self._seeds)

    def step(self, action: NDArray[np.floating], scale: ActionScale, q: float | None) -> None:
        """Takes a step, and begins the next episode where this one has ended."""
        try:
            returned = self._envs[self._i].step(scale.to_env(action))
        except RAISED_BY_ENVIRONMENT as error:
            self._replace(error)
            self._hooks.fail(self._i, error)
            self._begin()
            return
        number = len(self.rewards) + 1
        obs, reward, terminated, truncated, info = self._check.step(returned, number)
        check_finite(obs, "observation", self._name, number)
        check_finite(reward, "reward", self._name, number)
        self.obs = obs
        self.rewards.append(reward)
        if q is not None:
            self._q.append(q)
        self._hooks.step(self._i, action, obs, reward, info)
        length = env_steps_of(self._envs[self._i], number)
        if terminated or truncated or length >= self._limit:
            self.cut_off += not (terminated or truncated)
            extras = self._hooks.end(self._i)
            self.episodes.append(
                Episode(sum(self.rewards), length, extras, terminated, self.rewards, self._q)
            )
            if self.playing:
                self._begin()

    def _begin(self) -> None:
        self.rewards: list[float] = []
        self._q: list[float] = []
        self.obs, _ = self._hooks.start(self._i, self._reset)

    def _reset(self) -> tuple[NDArray[np.float32], dict[str, Any]]:
        try:
            returned = self._envs[self._i].reset(seed=self._seeds[len(self.episodes)])
        except RAISED_BY_ENVIRONMENT as error:
            self._replace(error)
            return self._reset()
        obs, info = self._check.reset(returned)
        check_finite(obs, "observation", self._name, 0)
        return obs, info

    def _replace(self, error: BaseException) -> None:
        """Replaces the environment, which raised, if that has not been done in this episode."""
        if self._restart is None or self._restarted == len(self.episodes):
            raise environment_failure(self._name, error, len(self.rewards)) from error
        self._restarted = len(self.episodes)
        self._restart(self._i)


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
