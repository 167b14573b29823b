"""Small environments whose every number is known, for the tests.

Importing this module registers them with Gymnasium; another process names one as
"environments:Counting-v0".
"""

import os
import resource
import time
import uuid
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

VECTOR = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
UNIT_ACTION = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
ASYMMETRIC_ACTION = gym.spaces.Box(
    np.array([-2.0, 0.0, 10.0], np.float32), np.array([1.0, 5.0, 10.5], np.float32)
)


class Counting(gym.Env):
    """Observes (episode, step), both counted from 0; the reward is 1 per step.

    Args:
        length: steps of each episode.
        ends_by: "truncation", "termination", or "both": even episodes by truncation, odd ones by
            termination.
    """

    observation_space, action_space = VECTOR, UNIT_ACTION

    def __init__(self, length: int = 5, ends_by: str = "both") -> None:
        self.length, self.ends_by = length, ends_by
        self.episode, self.step_number = -1, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.step_number += 1
        ended = self.step_number >= self.length
        even = self.episode % 2 == 0
        truncates = self.ends_by == "truncation" or (self.ends_by == "both" and even)
        return self._observe(), self._reward(), ended and not truncates, ended and truncates, {}

    def _observe(self) -> Any:
        return np.array([self.episode, self.step_number], np.float32)

    def _reward(self) -> float:
        return 1.0


class RecordingActions(Counting):
    """Keeps every action that it receives in `received`; its box has different, lopsided sides."""

    action_space = ASYMMETRIC_ACTION

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.received: list[Any] = []

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.received.append(np.array(action))
        return super().step(action)


class NonFinite(Counting):
    """Returns a NaN observation, or an infinite reward, at step `at_step` of its life.

    Args:
        quantity: "observation" or "reward".
    """

    def __init__(self, quantity: str, at_step: int, **options: Any) -> None:
        super().__init__(**options)
        self.quantity, self.at_step = quantity, at_step
        self.total_steps = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.total_steps += 1
        return super().step(action)

    def _is_bad(self) -> bool:
        return self.total_steps == self.at_step

    def _observe(self) -> Any:
        bad = self.quantity == "observation" and self._is_bad()
        return np.full(2, np.nan, np.float32) if bad else super()._observe()

    def _reward(self) -> float:
        return float("inf") if self.quantity == "reward" and self._is_bad() else 1.0


class Raising(Counting):
    """Its 30th step raises."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.total_steps = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.total_steps += 1
        if self.total_steps == 30:
            raise RuntimeError("the motor is on fire")
        return super().step(action)


class LateShape(Counting):
    """Its observations have three numbers instead of two from its 30th step on."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.total_steps = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.total_steps += 1
        return super().step(action)

    def _observe(self) -> Any:
        return np.zeros(3, np.float32) if self.total_steps >= 30 else super()._observe()


class Traceable(gym.Env):
    """Observes (high, low, step): 48 random bits that name the episode, and its step.

    A transition that is collected twice, or again from the same seed, is seen twice.

    Args:
        commands: a directory; the environment that finds a file "raise", "hang" or "slow" in it
            takes it away and does so, once.
        length: steps of each episode.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = UNIT_ACTION

    def __init__(self, commands: str | None = None, length: int = 50) -> None:
        self.commands, self.length = commands, length
        self.name, self.step_number = (0.0, 0.0), 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.name = tuple(self.np_random.integers(2**24, size=2) / 2**24)  # float32 holds 24 bits
        self.step_number = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.step_number += 1
        if self._told_to("raise"):
            raise RuntimeError("the motor is on fire")
        if self._told_to("hang"):
            while True:
                pass
        if self._told_to("slow"):
            time.sleep(2)
        return self._observe(), 1.0, False, self.step_number == self.length, {}

    def _told_to(self, command: str) -> bool:
        if self.commands is None:
            return False
        try:
            (Path(self.commands) / command).unlink()
        except FileNotFoundError:
            return False
        return True

    def _observe(self) -> Any:
        return np.array([*self.name, self.step_number], np.float32)


class Lasting(Counting):
    """Its episodes take as many steps as the variable EPISODE_LENGTH says."""

    def __init__(self) -> None:
        super().__init__(length=int(os.environ["EPISODE_LENGTH"]))


class Elsewhere(Counting):
    """Its state is said to be in another process: it cannot be captured."""

    def __getstate__(self) -> Any:
        raise TypeError("the state is in another process")


class Holding(gym.Wrapper):
    """InvertedPendulum, but that step 200 of its life waits for the file `go` in `directory`. It
    puts a file there to say so."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, directory: str) -> None:
        super().__init__(gym.make("InvertedPendulum-v5"))
        self.directory = Path(directory)
        self.life = 0

    def step(self, action: Any) -> Any:
        self.life += 1
        if self.life == 200:
            (self.directory / f"held-{uuid.uuid4()}").touch()
            while not (self.directory / "go").exists():
                time.sleep(0.02)
        return super().step(action)


class Limited(gym.Wrapper):
    """InvertedPendulum, but that its process can write no file above 100 kB from its 50th step on,
    if there is a file at `limited`."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, limited: str) -> None:
        super().__init__(gym.make("InvertedPendulum-v5"))
        self.limited = Path(limited)
        self.total_steps = 0

    def step(self, action: Any) -> Any:
        self.total_steps += 1
        if self.total_steps == 50 and self.limited.exists():
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        return super().step(action)


class Spaces(gym.Env):
    """Has the given spaces, and an episode of one step."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, True, False, {}


PARTS = gym.spaces.Dict(
    {
        "velocity": gym.spaces.Box(-5, 5, (2,), np.float64),
        "goal": gym.spaces.Dict(
            {"kind": gym.spaces.Discrete(3, start=1), "at": gym.spaces.Box(-1, 1, (), np.float32)}
        ),
        "legs": gym.spaces.Tuple((gym.spaces.MultiBinary(2), gym.spaces.MultiDiscrete([2, 3]))),
    }
)


class InParts(gym.Env):
    """Observes `PARTS`, drawn at random; the reward is the step's number times the action.

    Args:
        length: steps of each episode, which a truncation ends.
        broken_at: the step whose observation lacks the part "legs".
        offset: added to each reward.
    """

    observation_space, action_space = PARTS, UNIT_ACTION
    metadata = {"render_modes": ["rgb_array"], "render_fps": 100}  # noqa: RUF012

    def __init__(
        self,
        length: int = 10,
        broken_at: int | None = None,
        offset: float = 0.0,
        render_mode: str | None = None,
    ) -> None:
        self.length, self.broken_at, self.offset = length, broken_at, offset
        self.render_mode, self.step_number = render_mode, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.step_number = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.step_number += 1
        reward = self.step_number * float(action[0]) + self.offset
        return self._observe(), reward, False, self.step_number == self.length, {}

    def _observe(self) -> Any:
        random = self.np_random
        observation = {
            "velocity": random.uniform(-5, 5, 2),
            "goal": {"kind": random.integers(1, 4), "at": np.float32(random.uniform(-1, 1))},
            "legs": (random.integers(2, size=2), random.integers([2, 3])),
        }
        if self.step_number == self.broken_at:
            del observation["legs"]
        return observation

    def render(self) -> Any:
        return np.zeros((32, 32, 3), np.uint8)


class InTuple(InParts):
    """The same as a tuple."""

    observation_space = gym.spaces.Tuple(tuple(PARTS.spaces.values()))

    def _observe(self) -> Any:
        observation = super()._observe()
        return tuple(observation[name] for name in PARTS.spaces)


class Six(InParts):
    """Episodes of 6 steps; RLlib calls a class with its arguments as one dict."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(length=6)


def halved(env: gym.Env) -> gym.Env:
    """A wrapper: rewards are half as large."""
    return gym.wrappers.TransformReward(env, half)


def half(reward: float) -> float:
    return reward / 2


def none_at_all(env: gym.Env) -> None:
    """A wrapper that forgets to return the environment."""


UNSUITED_SPACES = {
    "DiscreteActions": (VECTOR, gym.spaces.Discrete(3)),
    "UnboundedActions": (VECTOR, gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)),
    "MatrixActions": (VECTOR, gym.spaces.Box(-1, 1, (2, 2), np.float32)),
    "PartlyImages": (
        gym.spaces.Dict({"eye": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), "at": VECTOR}),
        UNIT_ACTION,
    ),
    "PartlyText": (gym.spaces.Tuple((VECTOR, gym.spaces.Text(4))), UNIT_ACTION),
    "ImageObservations": (gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), UNIT_ACTION),
}


def _register(name: str, entry_point: Any, **kwargs: Any) -> None:
    gym.register(f"{name}-v0", entry_point, disable_env_checker=True, kwargs=kwargs)


_register("Counting", Counting)
_register("RecordingActions", RecordingActions)
_register("NanObservation", NonFinite, quantity="observation", at_step=70, length=100)
_register("LateNan", NonFinite, quantity="observation", at_step=70, length=6)
_register("Traceable", Traceable)
_register("Lasting", Lasting)
_register("Elsewhere", Elsewhere, length=50)
_register("Holding", Holding)
_register("InParts", InParts)
_register("InTuple", InTuple)
_register("LateMisfit", InParts, broken_at=7)
_register("Limited", Limited)
_register("Raising", Raising, length=100)
_register("LateShape", LateShape, length=100)
_register("InfiniteReward", NonFinite, quantity="reward", at_step=70, length=100)
for _name, (_observation_space, _action_space) in UNSUITED_SPACES.items():
    _register(_name, Spaces, observation_space=_observation_space, action_space=_action_space)
