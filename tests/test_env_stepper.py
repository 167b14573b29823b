"""Environments stepped in threads: the same outcomes, errors in their place, no foreign library."""

import threading
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from qvpo_rllib.rollout import stepper as env_stepper
from qvpo_rllib.rollout.stepper import PERIOD, TIMED_ROUNDS, EnvStepper, allowed_threads

NUM_ENVS = 5


class Watched(gym.Wrapper[Any, Any, Any, Any]):
    """Notes the threads that step it; raises at one step if asked to."""

    def __init__(self, env: gym.Env[Any, Any], raise_at: int = -1) -> None:
        super().__init__(env)
        self.threads: list[int] = []
        self.raise_at = raise_at

    def step(self, action: Any) -> Any:
        self.threads.append(threading.get_ident())
        if len(self.threads) == self.raise_at:
            raise RuntimeError("gear jammed")
        return self.env.step(action)


def environments(env_id: str = "Hopper-v5", **watched: int) -> list[Watched]:
    made = [Watched(gym.make(env_id), **watched) for _ in range(NUM_ENVS)]
    for seed, env in enumerate(made):
        env.reset(seed=seed)
    return made


@pytest.fixture
def stepper_of(request: pytest.FixtureRequest) -> Any:
    def make(envs: Any, threads: int) -> EnvStepper:
        stepper = EnvStepper(envs, threads)
        request.addfinalizer(stepper.stop)
        return stepper

    return make


def test_threads_give_the_same_bits_and_split_the_environments(stepper_of: Any) -> None:
    alone, shared = environments(), environments()
    steppers = stepper_of(alone, 1), stepper_of(shared, 3)
    actions = np.random.default_rng(0).uniform(-1, 1, (2 * TIMED_ROUNDS, NUM_ENVS, 3))
    for action in actions:
        for expected, found in zip(*(s.step(action) for s in steppers), strict=True):
            assert np.array_equal(expected[0], found[0])
            assert expected[1:4] == found[1:4]
    here = threading.get_ident()
    assert all(set(env.threads) == {here} for env in alone)
    # Half of the timed rounds are shared; the calling thread keeps the first part.
    others = [len(set(env.threads) - {here}) for env in shared]
    assert others == [0, 1, 1, 1, 1]
    assert all(env.threads.count(here) == TIMED_ROUNDS for env in shared[1:])
    assert len({t for env in shared for t in env.threads}) == 3


@pytest.mark.parametrize(("slow", "threads"), [(False, True), (True, False)])
def test_what_was_faster_is_used_until_it_is_timed_again(
    slow: bool, threads: bool, stepper_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**9))
    monkeypatch.setattr(env_stepper, "PERIOD", 2 * TIMED_ROUNDS + 3)
    envs = environments("InvertedPendulum-v5")
    stepper = stepper_of(envs, 2)
    now = 0.0

    def seconds() -> float:
        nonlocal now
        call = next(clock)
        # Calls come in pairs around a round; every other round is a shared one.
        shared = call // 2 % 2 == 1
        now += (1.0 if shared == slow else 0.5) if call % 2 else 0.0
        return now

    monkeypatch.setattr(env_stepper.time, "perf_counter", seconds)
    for _ in range(2 * TIMED_ROUNDS + 3):
        stepper.step(np.zeros((NUM_ENVS, 1)))
    here = threading.get_ident()
    assert [t != here for t in envs[-1].threads[-3:]] == [threads] * 3
    stepper.step(np.zeros((NUM_ENVS, 1)))
    stepper.step(np.zeros((NUM_ENVS, 1)))
    assert [t != here for t in envs[-1].threads[-2:]] == [False, True]  # timed again
    assert PERIOD > 50 * 2 * TIMED_ROUNDS  # timing costs little


def test_an_error_stands_in_its_environments_place(stepper_of: Any) -> None:
    envs = environments(raise_at=2)
    envs[0].raise_at = envs[1].raise_at = -1
    stepper = stepper_of(envs, 2)
    assert not any(isinstance(o, Exception) for o in stepper.step(np.zeros((NUM_ENVS, 3))))
    outcomes = stepper.step(np.zeros((NUM_ENVS, 3)))
    assert [isinstance(o, Exception) for o in outcomes] == [False, False, True, True, True]
    assert str(outcomes[3]) == "gear jammed"


def test_an_interrupted_round_leaves_nothing_behind(
    stepper_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = environments()
    stepper = stepper_of(envs, 2)
    stepper.step(np.zeros((NUM_ENVS, 3)))  # the first round is not shared, the second one is

    def interrupt(action: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(envs[0], "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stepper.step(np.zeros((NUM_ENVS, 3)))
    assert len(stepper.step(np.zeros((NUM_ENVS, 3)))) == NUM_ENVS
    before = envs[-1].env.unwrapped.data.time  # type: ignore[attr-defined]
    outcomes = stepper.step(np.zeros((NUM_ENVS, 3)))
    assert len(outcomes) == NUM_ENVS
    assert envs[-1].env.unwrapped.data.time > before  # type: ignore[attr-defined]
    last = outcomes[-1]
    assert not isinstance(last, Exception)
    assert np.array_equal(last[0], envs[-1].env.unwrapped._get_obs())  # type: ignore[attr-defined]


def test_other_libraries_are_called_from_one_thread(stepper_of: Any) -> None:
    pendulums = environments("Pendulum-v1")
    mixed = [*environments()[:1], *environments("Pendulum-v1")[:1]]
    for envs, actions in (
        (pendulums, np.zeros((NUM_ENVS, 1))),
        (mixed, [np.zeros(3), np.zeros(1)]),
    ):
        stepper = stepper_of(envs, 4)
        for _ in range(4):
            stepper.step(actions)
        assert {t for env in envs for t in env.threads} == {threading.get_ident()}


def test_a_worker_may_have_no_environment() -> None:
    assert EnvStepper([], 4).step(np.zeros((0, 3))) == []


def test_the_threads_end_when_it_stops() -> None:
    before = threading.active_count()
    stepper = EnvStepper(environments(), 3)
    assert threading.active_count() == before + 2
    stepper.stop()
    for thread in threading.enumerate():
        if thread.name == "env-stepper":
            thread.join(timeout=10)
    assert threading.active_count() == before
    assert len(stepper.step(np.zeros((NUM_ENVS, 3)))) == NUM_ENVS


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("3", 3), ("0", 1)])
def test_openmps_setting_is_the_limit(
    text: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert allowed_threads() == number
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert allowed_threads() >= 1
