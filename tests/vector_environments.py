"""Vector environments whose every number is known, for the tests.

Importing this module registers ids; another process names one as "vector_environments:Own-v0".
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

MODES = {mode.name: mode for mode in AutoresetMode}
OBSERVATION = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
ACTION = gym.spaces.Box(np.array([-2.0, 10.0]), np.array([2.0, 11.0]), dtype=np.float64)
LENGTHS = (1, 6)  # steps of an episode, the least and the most


class Cell:
    """Observes (draw, episode, step, what the actions were); an episode's length is drawn.

    Episodes are counted from 0, and again after a reset with a seed.
    """

    def __init__(self) -> None:
        self.random = np.random.default_rng()
        self.episode, self.number, self.length, self.total = 0, 0, 0, 0.0

    def reset(self, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.episode = 0 if seed is not None else self.episode + 1
        self.draw = self.random.random()
        self.length = int(self.random.integers(LENGTHS[0], LENGTHS[1] + 1))
        self.by_termination = bool(self.random.random() < 0.5)
        self.number, self.total = 0, 0.0
        return self._observe(), {"first": self.episode}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.number < self.length, "a step after an episode's end"
        assert ACTION.contains(np.asarray(action)), action
        self.number += 1
        self.total += float(action @ np.array([1.0, 0.1]))
        ended = self.number == self.length
        flags = ended and self.by_termination, ended and not self.by_termination
        info = {"number": self.number, "place": {"episode": self.episode}}
        return self._observe(), self.total + self.episode, *flags, info

    def _observe(self) -> Any:
        return np.array([self.draw, self.episode, self.number, self.total], np.float32)


class Drawn(gym.Env):
    """A `Cell` as an environment."""

    observation_space, action_space = OBSERVATION, ACTION

    def __init__(self) -> None:
        self.cell = Cell()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.cell.reset(seed)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.cell.step(action)


class Own(VectorEnv):
    """Many `Cell`s, as a simulator of its own would have them: in arrays that it changes in place.

    It takes one number as seed, and its infos have no masks.
    """

    def __init__(self, config: Any = None, num_envs: int = 3, mode: str = "NEXT_STEP") -> None:
        self.mode = MODES[(config or {}).get("mode", mode)]
        self.metadata = {"autoreset_mode": self.mode}
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = OBSERVATION, ACTION
        self.observation_space = gym.vector.utils.batch_space(OBSERVATION, num_envs)
        self.action_space = gym.vector.utils.batch_space(ACTION, num_envs)
        self.cells = [Cell() for _ in range(num_envs)]
        self.obs = np.zeros((num_envs, 4), np.float32)
        self.ended = np.zeros(num_envs, bool)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        if seed is not None:
            seed = int(np.uint32(seed))  # a TypeError for a list, as of JAX's keys
        for i in np.flatnonzero(mask):
            self.obs[i], _ = self.cells[i].reset(seed=None if seed is None else seed + int(i))
        self.ended[mask] = False
        return self.obs, {"first": np.array([cell.episode for cell in self.cells])}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        rewards = np.zeros(self.num_envs)
        flags = np.zeros((2, self.num_envs), bool)
        final = np.zeros_like(self.obs)
        for i, cell in enumerate(self.cells):
            if self.ended[i]:
                assert self.mode is AutoresetMode.NEXT_STEP
                self.obs[i], self.ended[i] = cell.reset()[0], False
                continue
            self.obs[i], rewards[i], *flags[:, i], _ = cell.step(actions[i])
            self.ended[i] = flags[:, i].any()
            if self.ended[i] and self.mode is AutoresetMode.SAME_STEP:
                final[i] = self.obs[i]
                self.obs[i], self.ended[i] = cell.reset()[0], False
        infos = {"number": np.array([cell.number for cell in self.cells])}
        if self.mode is AutoresetMode.SAME_STEP:
            infos |= {"final_obs": final, "final_info": {}}
        return self.obs, rewards, *flags, infos


class Elsewhere(Own):
    """Its state is said to be on another device: it cannot be captured."""

    def __getstate__(self) -> Any:
        raise TypeError("the state is on another device")


def sync(config: Any = None, num_envs: int = 3) -> SyncVectorEnv:
    """Gymnasium's own vector of `Drawn`, for `tune.register_env`."""
    makers = (Drawn for _ in range(num_envs))  # cannot be pickled; `make_vec` gives such too
    return SyncVectorEnv(makers, autoreset_mode=_mode(config))


def processes(config: Any = None, num_envs: int = 3) -> AsyncVectorEnv:
    return AsyncVectorEnv([Drawn] * num_envs, autoreset_mode=_mode(config))


def _mode(config: Any) -> AutoresetMode:
    return MODES[(config or {}).get("mode", "NEXT_STEP")]


def singles(number: int) -> Sequence[Drawn]:
    return [Drawn() for _ in range(number)]


def _own(num_envs: int, mode: str = "NEXT_STEP", **options: Any) -> Own:
    return Own(num_envs=num_envs, mode=mode)


gym.register("Own-v0", None, vector_entry_point=_own, max_episode_steps=LENGTHS[1])
gym.register("Both-v0", Drawn, vector_entry_point=_own, disable_env_checker=True)
