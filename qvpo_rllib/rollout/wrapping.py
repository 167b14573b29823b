"""What every environment is wrapped in: the user's wrappers, flat observations, action repeat.

The order, from the inside: the environment as it is made, `wrappers` in their order, the flattening
of a Dict or Tuple observation, `frame_skip`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from qvpo_rllib.core.observation_parts import ObservationParts
from qvpo_rllib.rollout.environments import layers_of
from qvpo_rllib.rollout.observation_spaces import parts_of
from qvpo_rllib.rollout.outcomes import Misfit


def wrapped(
    env: gym.Env[Any, Any], frame_skip: int = 1, wrappers: Sequence[str] = ()
) -> gym.Env[Any, Any]:
    """Returns the environment as the policy sees it.

    A Dict or Tuple observation that cannot be flattened stays, for `check_spaces` to refuse.

    Args:
        frame_skip: env steps for which each action is repeated.
        wrappers: "module:function", each called with the environment, the first one first.

    Raises:
        ValueError: a wrapper cannot be found or returns no environment.
    """
    for path in wrappers:
        env = entry_point(path)(env)
        if not isinstance(env, gym.Env):
            raise ValueError(
                f"The wrapper {path!r} returned {type(env).__name__}, but it must return a "
                "gymnasium.Env: the environment that it is given, wrapped."
            )
    if isinstance(env.observation_space, spaces.Dict | spaces.Tuple):
        try:
            env = FlatObservation(env)
        except ValueError:
            return env
    return FrameSkip(env, frame_skip) if frame_skip > 1 else env


def entry_point(path: str) -> Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]]:
    """Returns the wrapper "module:function". Raises `ValueError` if there is none."""
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"There is no wrapper {path!r} to be imported here ({error}). Give 'module:function', "
            "a function or class that takes an environment and returns it wrapped; the module must "
            "be installed or in the working directory."
        ) from None
    if not callable(found):
        raise ValueError(f"The wrapper {path!r} is no function but {type(found).__name__}.")
    wrap: Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]] = found
    return wrap


class FlatObservation(gym.Wrapper):  # type: ignore[misc]
    """Gives a Dict or Tuple observation as one vector, as `gymnasium.spaces.flatten` does.

    In the place of an observation that does not fit its space stands a `Misfit`, for `OutcomeCheck`
    to refuse.

    Raises `ValueError` when made for a space that has no such vector.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.parts = parts_of(env.observation_space)
        self.observation_space = spaces.flatten_space(env.observation_space)
        self._dtype = self.observation_space.dtype

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        returned = self.env.reset(seed=seed, options=options)
        if not isinstance(returned, tuple) or not returned:
            return returned
        return (self._flat(returned[0]), *returned[1:])

    def step(self, action: Any) -> Any:
        returned = self.env.step(action)
        if not isinstance(returned, tuple) or not returned:
            return returned
        return (self._flat(returned[0]), *returned[1:])

    def _flat(self, observation: Any) -> Any:
        try:
            vector: NDArray[Any] = self.parts.flatten(observation)
            return vector.astype(self._dtype, copy=False)
        except ValueError as error:
            return Misfit(str(error))


class FrameSkip(gym.Wrapper):  # type: ignore[misc]
    """Repeats each action for `frame_skip` env steps, or to the end of the episode if that is
    sooner; rewards are summed, all else is of the last env step.

    It is the outermost wrapper (`env_steps_of`).

    Attributes:
        episode_steps: env steps since the reset.
    """

    def __init__(self, env: gym.Env[Any, Any], frame_skip: int) -> None:
        super().__init__(env)
        self.frame_skip, self.episode_steps = frame_skip, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.episode_steps = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        total: Any = 0.0
        for _ in range(self.frame_skip):
            returned = self.env.step(np.array(action))  # a copy: it may change what it is given
            self.episode_steps += 1
            try:
                obs, reward, terminated, truncated, info = returned
                total = total + reward
                ended = bool(terminated) or bool(truncated)
            except (TypeError, ValueError):
                return returned  # for `OutcomeCheck` to refuse
            if ended:
                break
        return obs, total, terminated, truncated, info


def env_steps_of(env: gym.Env[Any, Any], policy_steps: int) -> int:
    """Returns the env steps of the episode under way, in which the policy has acted so often."""
    return int(env.episode_steps) if isinstance(env, FrameSkip) else policy_steps


def observation_parts(env: gym.Env[Any, Any]) -> ObservationParts | None:
    """Returns the parts of its observations if they were flattened, else None."""
    flat = (layer for layer in layers_of(env) if isinstance(layer, FlatObservation))
    return next((layer.parts for layer in flat), None)
