"""What an environment returns: checked against its spaces, and copied before anything else."""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import DTypeLike, NDArray

from qvpo_rllib.core.errors import UnusableOutcome
from qvpo_rllib.core.observation_parts import NUMBERS
from qvpo_rllib.rollout.wrapping import Misfit

# Observation, reward, terminated, truncated, info.
Step = tuple[NDArray[Any], float, bool, bool, dict[str, Any]]

RESET_API = "reset(seed=…, options=…) returns (observation, info), info a dict"
STEP_API = "step(action) returns (observation, reward, terminated, truncated, info)"


class OutcomeCheck:
    """Checks and copies what one environment returns.

    Copies, because an environment may hand out one array and change it later. All is checked at
    each reset and first step; of the other steps, the number of parts, the observation's shape and
    that the reward is a number. Whether numbers are finite is left to `check_finite`.

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
            if obs.shape == self._shape:
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
                "its space declares other parts",
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
