"""What an environment returns: checked against its spaces, and copied before anything else."""

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import DTypeLike, NDArray

from qvpo_rllib.core.errors import UnusableOutcome
from qvpo_rllib.core.observation_parts import NUMBERS

# Observation, reward, terminated, truncated, info.
Step = tuple[NDArray[Any], float, bool, bool, dict[str, Any]]
# The same of E sub-environments: [E, O], [E], [E], [E].
BatchStep = tuple[
    NDArray[np.float32],
    NDArray[np.float64],
    NDArray[np.bool_],
    NDArray[np.bool_],
    dict[str, Any],
]

FLAG = (bool, np.bool_)
RESET_API = "reset(seed=…, options=…) returns (observation, info), info a dict"
STEP_API = "step(action) returns (observation, reward, terminated, truncated, info)"
BATCH_RESET_API = "reset(seed=…, options=…) of a vector environment returns (observations, infos)"
BATCH_STEP_API = (
    "step(actions) of a vector environment returns (observations, rewards, terminations, "
    "truncations, infos)"
)


class Misfit(NamedTuple):
    """In an observation's place: why it does not fit its space."""

    why: str


class OutcomeCheck:
    """Checks and copies what one environment returns.

    Copies, because an environment may hand out one array and change it later. That observations
    are numbers is checked at each reset and first step, all else at every step, and whether numbers
    are finite by `check_finite`.

    Args:
        where: names the environment in messages.
        dtype: of the copies; None: as they are.
    """

    def __init__(
        self, env: gym.Env[Any, Any], where: str, dtype: DTypeLike | None = np.float32
    ) -> None:
        self._space, self._where, self._dtype = env.observation_space, where, dtype
        self._shape = env.observation_space.shape

    def reset(self, returned: Any) -> tuple[NDArray[Any], dict[str, Any]]:
        """Returns observation and info of a reset. Raises `UnusableOutcome`."""
        two = isinstance(returned, tuple) and len(returned) == 2
        if not two or not isinstance(returned[1], dict):
            raise self._error("its reset", _describe(returned), RESET_API)
        return self._observation(returned[0], "its reset"), returned[1]

    def step(self, returned: Any, number: int) -> Step:
        """Returns the parts of an episode's step `number`, from 1. Raises `UnusableOutcome`."""
        if number == 1:
            self._check_step(returned)
        try:
            observed, reward, terminated, truncated, info = returned
            obs = np.array(observed, self._dtype)
            if not isinstance(reward, float):
                reward = _number(reward)
            flags = isinstance(terminated, FLAG) and isinstance(truncated, FLAG)
            if not (flags and isinstance(info, dict)):
                self._check_step(returned, number)
            # A `Misfit` could be an array of the right shape: that of one text.
            if obs.shape == self._shape and not isinstance(observed, Misfit):
                return obs, float(reward), bool(terminated), bool(truncated), info
        except (TypeError, ValueError):
            pass
        self._check_step(returned, number)
        raise self._error(f"step {number} of the episode", _describe(returned), STEP_API)

    def _check_step(self, returned: Any, number: int = 1) -> None:
        step = f"step {number} of the episode"
        if not isinstance(returned, tuple) or len(returned) != 5:
            raise self._error(step, _describe(returned), STEP_API)
        observed, reward, terminated, truncated, info = returned
        self._observation(observed, step)
        try:
            _number(reward)
        except (TypeError, ValueError):
            wanted = f"{STEP_API}, and the reward is a number"
            raise self._error(step, f"the reward {_describe(reward)}", wanted) from None
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            found = np.asarray(flag)
            if found.size != 1 or found.dtype.kind not in NUMBERS:
                wanted = f"{STEP_API}, and {name} is True or False"
                raise self._error(step, f"{name} as {_describe(flag)}", wanted)
        if not isinstance(info, dict):
            raise self._error(step, f"info as {_describe(info)}", f"{STEP_API}, info a dict")

    def _observation(self, observed: Any, when: str) -> NDArray[Any]:
        if isinstance(observed, Misfit):
            raise self._error(
                when,
                f"an observation that does not fit: {observed.why}",
                "it must be an element of its space",
            )
        try:
            plain = np.array(observed)
        except (TypeError, ValueError):
            plain = np.array(None)
        if plain.shape != self._shape or plain.dtype.kind not in NUMBERS:
            declared = f"the observation space declares shape {self._shape}: {self._space}"
            raise self._error(when, f"the observation {_describe(observed)}", declared)
        return plain if self._dtype is None else plain.astype(self._dtype, copy=False)

    def _error(self, when: str, found: str, wanted: str) -> UnusableOutcome:
        return UnusableOutcome(
            f"{self._where}: {when} returned {found}, but {wanted}. Correct the environment; "
            "gymnasium.utils.env_checker.check_env(env) looks for more of this kind."
        )


class BatchCheck:
    """Checks and copies what a vector environment returns, of all its sub-environments at once.

    Args:
        space: the observations' space of one sub-environment.
        where: names the environment in messages.
    """

    def __init__(self, space: gym.Space, num_envs: int, where: str) -> None:
        self._space, self._num_envs, self._where = space, num_envs, where

    def reset(self, returned: Any) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Returns observations [E, O] and infos of a reset. Raises `UnusableOutcome`."""
        two = isinstance(returned, tuple) and len(returned) == 2
        if not two or not isinstance(returned[1], dict):
            raise self.error("its reset", _describe(returned), f"{BATCH_RESET_API}, infos a dict")
        return self._observations(returned[0], "its reset", self._num_envs), returned[1]

    def step(self, returned: Any) -> BatchStep:
        """Returns the parts of a step. Raises `UnusableOutcome`."""
        when, number = "its step", self._num_envs
        if not isinstance(returned, tuple) or len(returned) != 5:
            raise self.error(when, _describe(returned), BATCH_STEP_API)
        observed, *columns, infos = returned
        obs = self._observations(observed, when, number)
        numbers = []
        names = ("rewards", "terminations", "truncations")
        for name, column in zip(names, columns, strict=True):
            found = _plain(column)
            if found.shape != (number,) or found.dtype.kind not in NUMBERS:
                wanted = f"{BATCH_STEP_API}, and {name} are {number} numbers, of shape ({number},)"
                raise self.error(when, f"{name} as {_describe(column)}", wanted)
            numbers.append(found)
        if not isinstance(infos, dict):
            wanted = f"{BATCH_STEP_API}, infos a dict"
            raise self.error(when, f"infos as {_describe(infos)}", wanted)
        return obs, numbers[0].astype(float), numbers[1] != 0, numbers[2] != 0, infos

    def final_obs(self, infos: dict[str, Any], ended: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Returns the last observations of the sub-environments that have ended, [number, O]."""
        rows, name = np.flatnonzero(ended), "infos['final_obs']"
        try:
            found = [infos["final_obs"][i] for i in rows]
        except (KeyError, IndexError, TypeError):
            raise self.error(
                "its step",
                f"infos with {', '.join(infos) or 'no names'} at an episode's end",
                f"the autoreset mode is SAME_STEP, and {name} has the last observations",
            ) from None
        return self._observations(found, f"{name} of its step", len(rows))

    def _observations(self, observed: Any, when: str, number: int) -> NDArray[np.float32]:
        plain, shape = _plain(observed), (number, *(self._space.shape or ()))
        if plain.shape != shape or plain.dtype.kind not in NUMBERS:
            declared = f"{number} sub-environments with the space {self._space} have shape {shape}"
            raise self.error(when, f"the observations {_describe(observed)}", declared)
        return plain.astype(np.float32)

    def error(self, when: str, found: str, wanted: str) -> UnusableOutcome:
        """Returns the error for what the environment returned."""
        return UnusableOutcome(
            f"{self._where}: {when} returned {found}, but {wanted}. Correct the vector environment."
        )


def _plain(value: Any) -> NDArray[Any]:
    """Returns an array, of objects where it is none of numbers."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        return np.array(None)


def _number(value: Any) -> float:
    """Returns a number, or the only one of an array."""
    array = np.asarray(value)
    if array.dtype.kind not in NUMBERS or array.size != 1:
        raise TypeError("not a number")
    return float(array.reshape(())[()])


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)} ({', '.join(type(item).__name__ for item in value)})"
    text = " ".join(repr(value).split())
    shape = f" of shape {value.shape}" if isinstance(value, np.ndarray) else ""
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__}{shape})"
