"""What environments and users' code may do: outcomes, restarts, arguments, callbacks, names."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environments
import gymnasium as gym
import numpy as np
import pytest
from environments import Counting
from ray import tune
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.vector_env import VectorEnv

from qvpo_rllib import QVPOConfig, QVPOTorchPolicy
from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.algorithms.on_rllib import CheckedVectorEnv
from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.core.env_config import decode_env_config, encode_env_config
from qvpo_rllib.core.errors import EnvironmentFailure, UnusableOutcome
from qvpo_rllib.core.seeding import environment_seed
from qvpo_rllib.rollout import episodes
from qvpo_rllib.rollout.environments import check_environment
from qvpo_rllib.rollout.outcomes import OutcomeCheck
from qvpo_rllib.rollout.worker import ColumnarRolloutWorker
from qvpo_rllib.rollout.wrapping import FlatObservation
from qvpo_rllib.runtime.ray_private import environment_maker

SCALE = ActionScale(environments.UNIT_ACTION.low, environments.UNIT_ACTION.high)


class InPlace(Counting):
    """Hands out one array and changes it in place."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.obs = np.zeros(2, np.float32)

    def _observe(self) -> Any:
        self.obs[:] = self.episode, self.step_number
        return self.obs


class Fails(Counting):
    """Its step `at`, or its reset, raises; a replacement does not."""

    made = 0
    error: type[BaseException] = RuntimeError

    def __init__(self, at: int = 3, **options: Any) -> None:
        super().__init__(**options)
        type(self).made += 1
        self.at = at if type(self).made == 1 else -1

    def step(self, action: Any) -> Any:
        if self.step_number + 1 == self.at:
            raise self.error("gear jammed")
        return super().step(action)


@pytest.fixture(params=[RuntimeError, SystemExit])
def failing(monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """A first `Fails` raises; with SystemExit as where somebody closes a viewer's window."""
    monkeypatch.setattr(Fails, "made", 0)
    monkeypatch.setattr(Fails, "error", request.param)


def worker_of(make: Callable[[], gym.Env[Any, Any]], **settings: Any) -> ColumnarRolloutWorker:
    """A rollout worker alone, without Ray; a fragment has 12 steps."""
    config = QVPOConfig().environment("Counting-v0").debugging(seed=0, log_level="ERROR")
    config.training(hidden=(4,), diffusion_steps=2, engine="eager")
    config.env_runners(rollout_fragment_length=12)
    config.update_from_dict(settings)
    return ColumnarRolloutWorker(
        env_creator=lambda context: make(), default_policy_class=QVPOTorchPolicy, config=config
    )


def play(env: gym.Env[Any, Any], **options: Any) -> list[episodes.Episode]:
    def act(obs: Any) -> tuple[Any, None]:
        return np.zeros((len(obs), 1)), None

    return episodes.run_episodes([env], act, SCALE, [1, 2], "Tested", **options)


# --- outcomes ----------------------------------------------------------------------------------


def test_an_observation_changed_in_place_is_stored_as_it_was() -> None:
    batch = worker_of(lambda: InPlace(ends_by="truncation")).collect(random_actions=True)
    assert batch["truncateds"].sum() == 2
    np.testing.assert_array_equal(batch["new_obs"][:, 0], batch["obs"][:, 0])
    np.testing.assert_array_equal(batch["new_obs"][:, 1], batch["obs"][:, 1] + 1)


def test_rllibs_own_workers_get_copies_too() -> None:
    env = InPlace()
    checked = vector_of([env])
    first, _ = checked.vector_reset()
    second = checked.vector_step([np.zeros(1)])[0]
    checked.reset_at(0)
    assert [first[0].tolist(), second[0].tolist()] == [[0, 0], [0, 1]]


def vector_of(envs: list[Any], restarts: bool = False) -> CheckedVectorEnv:
    plain = VectorEnv.vectorize_gym_envs(
        make_env=lambda i: Fails(), existing_envs=envs, num_envs=len(envs)
    )
    return CheckedVectorEnv(plain, "Tested (worker 0", restarts=restarts)


GOOD = (np.zeros(2, np.float32), 1.0, False, False, {})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((np.zeros(1), *GOOD[1:]), r"shape \(1,\)\), but .* declares shape \(2,\)"),
        ((np.zeros((2, 1)), *GOOD[1:]), r"shape \(2, 1\)\), but .* declares shape \(2,\)"),
        ((0.5, *GOOD[1:]), r"0\.5 \(float\), but .* declares shape \(2,\)"),
        ((np.array(["a", "b"]), *GOOD[1:]), "declares shape"),
        ((GOOD[0], None, False, False, {}), "the reward None"),
        ((GOOD[0], np.zeros(2), False, False, {}), r"the reward array.*shape \(2,\)"),
        ((GOOD[0], 1.0, False, {}), r"a tuple of 4 .*terminated, truncated, info\)"),
        ((GOOD[0], 1.0, None, False, {}), "terminated as None"),
        ((GOOD[0], 1.0, "yes", False, {}), "terminated as 'yes'"),
        ((GOOD[0], 1.0, False, {}, False), "truncated as {}"),
        ((GOOD[0], 1.0, False, False, None), "info as None"),
    ],
)
def test_a_wrong_step_is_refused_by_environment_step_and_value(returned: Any, message: str) -> None:
    check = OutcomeCheck(Counting(), "Tested (worker 3, environment 1)")
    for number in (1, 7):
        with pytest.raises(UnusableOutcome, match=message) as error:
            check.step(returned, number)
        assert f"Tested (worker 3, environment 1): step {number} of" in str(error.value)


@pytest.mark.parametrize("dtype", [None, np.float32])
def test_an_observation_of_one_number_that_does_not_fit_is_refused_in_any_step(dtype: Any) -> None:
    class OneNumber(Counting):
        observation_space = gym.spaces.Dict({"height": gym.spaces.Box(-1, 1, (1,))})

        def step(self, action: Any) -> Any:
            return ({}, *super().step(action)[1:])

    env = FlatObservation(OneNumber())
    env.reset()
    with pytest.raises(UnusableOutcome, match=r"step 7 .* does not fit: .*'height'"):
        OutcomeCheck(env, "Tested", dtype).step(env.step(np.zeros(1)), 7)


@pytest.mark.parametrize("returned", [np.zeros(2), (np.zeros(3), {}), (np.zeros(2), None)])
def test_a_wrong_reset_is_refused(returned: Any) -> None:
    with pytest.raises(UnusableOutcome, match="Tested: its reset returned"):
        OutcomeCheck(Counting(), "Tested").reset(returned)


@pytest.mark.parametrize("reward", [2, np.float32(2), np.full(1, 2.0), np.array(2)])
def test_a_reward_of_one_element_is_a_number(reward: Any) -> None:
    found = OutcomeCheck(Counting(), "Tested").step((GOOD[0], reward, *GOOD[2:]), 2)[1]
    assert (found, type(found)) == (2.0, float)


def test_every_loop_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "_observe", lambda self: np.zeros(1, np.float32))
    for loop in (
        lambda: worker_of(Counting).collect(random_actions=True),
        lambda: play(Counting()),
        vector_of([Counting()]).vector_reset,
    ):
        with pytest.raises(UnusableOutcome, match=r"shape \(1,\)"):
            loop()


# --- environments that raise, never end, or normalise ------------------------------------------


def test_only_the_environment_that_raised_is_restarted(monkeypatch: Any) -> None:
    monkeypatch.setattr(Fails, "made", 0)
    worker = worker_of(Fails, num_envs_per_env_runner=2, restart_failed_sub_environments=True)
    other = worker.envs[1]
    batch = worker.collect(random_actions=True)
    assert batch.count == 23  # of 24
    assert worker.envs[1] is other
    faulty = [m.episode_faulty for m in worker.get_metrics()]
    assert faulty.count(True) == 1
    np.testing.assert_array_equal(batch["new_obs"][:, 1], batch["obs"][:, 1] + 1)


def test_without_that_the_error_names_environment_and_step(failing: None) -> None:
    with pytest.raises(
        EnvironmentFailure, match=r"gear jammed \[test_outcomes\.py:\d+\] \(after 3 steps"
    ):
        worker_of(lambda: Fails(at=4)).collect(random_actions=True)


def test_a_step_of_the_old_gym_is_told_what_it_must_return() -> None:
    class Old(Counting):
        def step(self, action: Any) -> Any:
            return super().step(action)[:4]

    with pytest.raises(EnvironmentFailure, match=r"Its step must return \(obs, reward, terminated"):
        worker_of(lambda: gym.wrappers.TimeLimit(Old(), 9)).collect(random_actions=True)


def test_rllibs_own_workers_restart_it_too(failing: None) -> None:
    checked = vector_of([Fails(at=1), Counting()], restarts=True)
    checked.seed(lambda i, again: 10 * i + again)
    checked.vector_reset()
    obs, rewards, terminateds, *_ = checked.vector_step([np.zeros(1)] * 2)
    assert isinstance(obs[0], RuntimeError)
    assert (rewards, terminateds) == ([0.0, 1.0], [True, False])
    assert checked.reset_at(0)[0].tolist() == [0, 0]


def test_an_evaluation_plays_the_episode_again(failing: None, monkeypatch: Any) -> None:
    envs: list[gym.Env[Any, Any]] = [Fails()]

    def restart(i: int) -> None:
        envs[i] = Fails()

    def act(obs: Any) -> tuple[Any, None]:
        return np.zeros((len(obs), 1)), None

    played = episodes.run_episodes(envs, act, SCALE, [1, 2], "Tested", restart=restart)
    assert [episode.length for episode in played] == [5, 5]
    monkeypatch.setattr(Fails, "made", 0)
    with pytest.raises(EnvironmentFailure, match="gear jammed"):
        play(Fails())


def test_an_episode_without_a_limit_is_cut_off_and_that_is_said(
    monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(episodes, "MAX_EPISODE_STEPS", 20)
    monkeypatch.setattr(episodes, "REPORT_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, "qvpo_rllib"):
        played = play(Counting(length=10**9))
        assert [(e.length, e.terminated) for e in played] == [(20, False)] * 2
        assert "2 of 2 episodes were cut off after 20 steps" in caplog.text
        assert "1 of 2 episodes have ended" in caplog.text
        caplog.clear()
        check_environment(Counting(), "Endless-v0")
        assert "Endless-v0 declares no time limit" in caplog.text
    limited = gym.wrappers.TimeLimit(Counting(length=10**9), 30)
    assert [e.length for e in play(limited)] == [30, 30]


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("NormalizeObservation", "normalize_observations"),
        ("NormalizeReward", "normalize_rewards"),
    ],
)
def test_running_statistics_are_refused_anywhere_in_the_chain(name: str, instead: str) -> None:
    wrapper = getattr(gym.wrappers, name)(Counting())
    with pytest.raises(
        ValueError, match=f"Tested: The wrapper {name} .*{instead}=true.*update_running_mean"
    ):
        check_environment(gym.wrappers.TimeLimit(wrapper, 5), "Tested")
    wrapper.update_running_mean = False
    check_environment(wrapper, "Tested")


def test_seeds_of_environments_have_32_bits_and_differ() -> None:
    keys = [
        (s, w, i, again) for s in range(3) for w in range(3) for i in range(3) for again in (0, 1)
    ]
    seeds = [environment_seed(s, 0, w, i, again) for s, w, i, again in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**32 for seed in seeds)


# --- arguments ---------------------------------------------------------------------------------


def test_env_config_comes_back_as_it_was() -> None:
    given = {
        "plain": [None, True, 3, 0.1, "text", {"nested": (1, 2)}],
        "floats": [float("inf"), -0.0, np.float32(0.1), np.int64(7), np.bool_(True)],
        "path": Path("models/ant.xml"),
        "array": np.array([[1.5, np.nan]], np.float32),
        "texts": np.array(["a", "bc"]),
    }
    encoded = json.loads(json.dumps(encode_env_config(EnvContext(given, 0)), allow_nan=False))
    found = decode_env_config(encoded)
    np.testing.assert_array_equal(found.pop("array"), given["array"])
    np.testing.assert_array_equal(found.pop("texts"), given["texts"])
    assert found == {name: given[name] for name in ("plain", "floats", "path")}
    assert [type(v) for v in found["floats"]] == [type(v) for v in given["floats"]]
    assert np.isnan(decode_env_config(encode_env_config(float("nan"))))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("value", [print, {1: 2}, {"$path": "x"}, 1j, np.array([None])])
def test_what_cannot_be_kept_is_refused_before_training(name: str, value: Any) -> None:
    config = ALGORITHMS[name].load().get_default_config()
    config.environment("Counting-v0", env_config={"rest": {"odd": value}})
    with pytest.raises(ValueError, match=r"env_config\['rest'\]\['odd'\]"):
        config.validate()


@pytest.mark.parametrize("damaged", [{"$path": 3}, {"$array": ["<f4", [2], "00"]}, {"$new": 1}])
def test_a_damaged_env_config_is_refused(damaged: Any) -> None:
    with pytest.raises(ValueError, match=r"env_config has a"):
        decode_env_config(damaged)


# --- names -------------------------------------------------------------------------------------


def test_environments_are_found_by_every_kind_of_name() -> None:
    tune.register_env("registered", lambda context: Counting(**context))
    for env in ("Counting-v0", "environments:Counting-v0", "registered"):
        made = environment_maker(env)(EnvContext({"length": 8}, 0))
        assert made.unwrapped.length == 8
    with pytest.raises(ValueError, match="Did you mean 'Counting-v0'"):
        environment_maker("Countin-v0")
    with pytest.raises(ValueError, match=r"no class 'environments\.Missing'.*top of a module"):
        environment_maker("environments.Missing")(EnvContext({}, 0))


# --- callbacks ---------------------------------------------------------------------------------


class Watching(RLlibCallback):
    """Keeps what an episode says at each step and at its end."""

    seen: list[Any] = []  # noqa: RUF012

    def on_episode_step(self, *, episode: Any, **kwargs: Any) -> None:
        self.seen.append((episode.length, episode.last_observation_for()[1]))
        assert episode.last_action_for().shape == (1,)

    def on_episode_end(self, *, episode: Any, **kwargs: Any) -> None:
        if not isinstance(episode, Exception):
            episode.custom_metrics["success"] = episode.last_info_for()["success"]


class Also(RLlibCallback):
    def on_episode_end(self, *, episode: Any, **kwargs: Any) -> None:
        Watching.seen.append("also")


def test_callbacks_see_length_observation_and_info(monkeypatch: Any) -> None:
    step = Counting.step
    monkeypatch.setattr(Counting, "step", lambda *a: (*step(*a)[:4], {"success": 1.0}))
    monkeypatch.setattr(Watching, "seen", [])
    config = QVPOConfig().callbacks([Watching, Also], on_episode_end=lambda **k: seen.append("f"))
    seen = Watching.seen
    worker = worker_of(Counting, callbacks_class=config.callbacks_class)
    worker.collect(random_actions=True)
    assert seen[:7] == [*((n, n) for n in range(1, 6)), "also", "f"]
    metrics = worker.get_metrics()[0]
    assert (metrics.episode_length, metrics.custom_metrics["success"]) == (5, 1.0)
    assert metrics.agent_rewards == {("agent0", "default_policy"): 5.0}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "callback", ["on_environment_created", "on_learn_on_batch", "on_postprocess_trajectory"]
)
def test_a_callback_that_nothing_calls_is_refused(name: str, callback: str) -> None:
    config = ALGORITHMS[name].load().get_default_config().environment("Counting-v0")
    config.callbacks(type("Own", (RLlibCallback,), {callback: lambda self, **arguments: None}))
    rllib_calls_it = name in ("ppo", "spo", "sac") and callback != "on_environment_created"
    if rllib_calls_it:
        config.validate()
        return
    with pytest.raises(ValueError, match=f"The callback {callback} is not supported"):
        config.validate()


def test_no_more_evaluation_environments_than_episodes() -> None:
    config = QVPOConfig().environment("Counting-v0")
    config.evaluation(evaluation_interval=1, evaluation_duration=5, evaluation_num_env_runners=2)
    assert config.get_evaluation_config_object().num_envs_per_env_runner == 3


def test_sacs_ratio_is_of_the_training_environments_alone() -> None:
    config = ALGORITHMS["sac"].load().get_default_config().environment("Counting-v0")
    config.training(update_ratio=0.5).evaluation(evaluation_interval=1, evaluation_duration=3)
    config.validate()
    config.get_evaluation_config_object().validate()
