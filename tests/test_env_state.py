"""Environments in mid-episode as bytes, and back: the next steps are the same to the last bit."""

import threading
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from qvpo_rllib.checkpoints.env_state import NotCapturableError, capture, restore

TASKS = ["Hopper-v5", "Walker2d-v5", "Ant-v5", "HalfCheetah-v5", "Humanoid-v5"]


def play(env: gym.Env, steps: int, seed: int) -> list[Any]:
    """Random actions; what `step` and `reset` return, numbers only."""
    random, seen = np.random.default_rng(seed), []
    for _ in range(steps):
        action = random.uniform(env.action_space.low, env.action_space.high)
        obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        seen.append([*obs, reward, terminated, truncated])
        if terminated or truncated:
            seen.append(list(env.reset()[0]))  # draws from the environment's own generator
    return seen


@pytest.mark.parametrize("task", TASKS)
def test_mujoco_goes_on_bit_for_bit(task: str) -> None:
    original, other = (gym.make(task, max_episode_steps=40) for _ in range(2))
    original.reset(seed=1)
    other.reset(seed=2)
    play(other, 3, seed=0)
    play(original, 31, seed=1)
    state = capture(original)
    expected = play(original, 60, seed=2)  # past the time limit
    restore(other, state)
    assert play(other, 60, seed=2) == expected
    restore(original, state)  # into the one it came from, too
    assert play(original, 60, seed=2) == expected


def test_a_changed_model_comes_back() -> None:
    original, other = gym.make("Hopper-v5"), gym.make("Hopper-v5")
    original.reset(seed=1)
    other.reset(seed=1)
    original.unwrapped.model.body_mass[:] *= 2
    restore(other, capture(original))
    np.testing.assert_array_equal(
        other.unwrapped.model.body_mass, original.unwrapped.model.body_mass
    )
    assert play(other, 10, seed=3) == play(original, 10, seed=3)


def test_rendering_shows_the_restored_state() -> None:
    env = gym.make("Hopper-v5")
    env.reset(seed=1)
    restore(env, capture(env))
    renderer = env.unwrapped.mujoco_renderer
    assert renderer.data is env.unwrapped.data
    assert renderer.model is env.unwrapped.model


def test_any_environment_that_is_made_of_python() -> None:
    original, other = (
        gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda r: 2 * r) for _ in range(2)
    )
    original.reset(seed=1)
    other.reset(seed=2)
    original.unwrapped.added_later = 3
    other.unwrapped.only_here = 4
    play(original, 17, seed=1)
    restore(other, capture(original))
    assert other.unwrapped.added_later == 3
    assert not hasattr(other.unwrapped, "only_here")
    assert other.unwrapped is not original.unwrapped
    assert play(other, 250, seed=2) == play(original, 250, seed=2)


def test_a_spec_that_was_asked_for_in_one_only() -> None:
    original, other = gym.make("Pendulum-v1"), gym.make("Pendulum-v1")
    assert original.spec is not None  # wrappers remember it from now on
    original.reset(seed=1)
    restore(other, capture(original))
    assert other.spec == original.spec
    restore(original, capture(other))
    assert play(other, 5, seed=2) == play(original, 5, seed=2)


class Handle(gym.Wrapper):
    """Its state is behind a handle, which it says by refusing to be pickled."""

    def __getstate__(self) -> Any:
        raise TypeError("the simulator is in another process")


class Holding(gym.Wrapper):
    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.model_env = gym.make("Hopper-v5")


class WithGenerator(gym.Wrapper):
    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.frames = (i for i in range(3))


class InC(gym.Wrapper, threading.local):
    """A part of its state is where C put it, as of EnvPool's."""


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [
        (Handle, "in another process"),
        (Holding, "another environment"),
        (WithGenerator, "pickle"),
        (InC, "cannot pickle 'InC'"),
    ],
)
def test_what_cannot_be_captured_says_why(wrapper: Any, reason: str) -> None:
    env = wrapper(gym.make("Pendulum-v1"))
    env.reset(seed=1)
    with pytest.raises(NotCapturableError, match=reason):
        capture(env)


@pytest.mark.parametrize("task", ["Pendulum-v1", "MountainCarContinuous-v0", "Hopper-v5"])
def test_another_environment_is_refused(task: str) -> None:
    state = capture(gym.make("Pendulum-v1"))
    env = gym.make(task)
    if task == "Pendulum-v1":
        env = gym.wrappers.TransformReward(env, lambda r: r)
    env.reset(seed=1)
    with pytest.raises(NotCapturableError, match="other wrappers, or is another environment"):
        restore(env, state)
    play(env, 3, seed=0)
