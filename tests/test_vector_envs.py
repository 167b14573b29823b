"""Vector environments: the transitions, episodes and evaluations of the same environments alone."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import vector_environments as vectors
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from ray import tune
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.env.env_context import EnvContext
from vector_environments import MODES, Drawn, Own, singles

from qvpo_rllib import QVPOConfig
from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.algorithms.qvpo import QVPOTorchPolicy
from qvpo_rllib.core.errors import EnvironmentFailure, NonFiniteError, UnusableOutcome
from qvpo_rllib.core.seeding import environment_seed
from qvpo_rllib.rollout import episodes
from qvpo_rllib.rollout.env_batch import EnvBatch, as_batch
from qvpo_rllib.rollout.environments import action_scale, check_environment
from qvpo_rllib.rollout.worker import ColumnarRolloutWorker
from qvpo_rllib.runtime.ray_private import environment_maker
from qvpo_rllib.training.plan import make_plan
from qvpo_rllib.tuning.spec import ExperimentSpec

NUM_ENVS = 3
LENGTH = 40  # steps of each environment in a fragment
SCALE = action_scale(vectors.ACTION)
FLAGS = ("terminateds", "truncateds")


def worker_of(make: Callable[[], Any], num_envs: int = NUM_ENVS, **settings: Any) -> Any:
    """A rollout worker alone, without Ray."""
    config = QVPOConfig().environment("Counting-v0").debugging(seed=0, log_level="ERROR")
    config.training(hidden=(4,), diffusion_steps=2, engine="eager")
    config.env_runners(rollout_fragment_length=LENGTH, num_envs_per_env_runner=num_envs)
    config.update_from_dict(settings)
    return ColumnarRolloutWorker(
        env_creator=lambda context: as_batch(make(), "Tested"),
        default_policy_class=QVPOTorchPolicy,
        config=config,
    )


def vector(mode: str, kind: str = "sync", num_envs: int = NUM_ENVS) -> Any:
    make = {"sync": vectors.sync, "processes": vectors.processes, "own": Own}[kind]
    return make({"mode": mode}, num_envs=num_envs)


def replayed(batch: Any, env: Drawn, rows: Any, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each of `rows`, and what `env` alone has for it after the same actions."""
    obs, _ = env.reset(seed=seed)
    for row in rows:
        next_obs, reward, *flags, _ = env.step(SCALE.to_env(batch["actions"][row]))
        found = {"obs": obs, "new_obs": next_obs, "rewards": np.float32(reward)}
        yield row, found | dict(zip(FLAGS, flags, strict=True))
        obs = env.reset()[0] if any(flags) else next_obs


# --- transitions -------------------------------------------------------------------------------


@pytest.mark.parametrize("random_actions", [True, False])
@pytest.mark.parametrize("mode", ["SAME_STEP", "DISABLED"])
def test_a_fragment_is_that_of_the_environments_alone(mode: str, random_actions: bool) -> None:
    found, expected = worker_of(lambda: vector(mode)), worker_of(Drawn)
    for _ in range(2):
        batch = found.collect(random_actions=random_actions)
        alone = expected.collect(random_actions=random_actions)
        assert batch.count == LENGTH * NUM_ENVS
        assert batch[FLAGS[0]].sum() > 5 < batch[FLAGS[1]].sum()
        for name in alone:
            np.testing.assert_array_equal(batch[name], alone[name], err_msg=name)
        assert found.get_metrics() == expected.get_metrics()


@pytest.mark.parametrize("kind", ["sync", "processes", "own"])
@pytest.mark.parametrize("mode", MODES)
def test_each_transition_is_the_environments_own(mode: str, kind: str) -> None:
    """Also in the mode NEXT_STEP, whose resets take the place of steps."""
    worker = worker_of(lambda: vector(mode, kind))
    batch = worker.collect(random_actions=True)
    numbers = batch["new_obs"][:, 2]
    # Which sub-environment a row is of: `draw` names the episode.
    owner, envs = {}, singles(NUM_ENVS)
    seeds = [environment_seed(0, 0, 0, i) for i in range(NUM_ENVS)]
    if kind == "own":
        seeds = [seeds[0] + i for i in range(NUM_ENVS)]
    for i, env in enumerate(singles(NUM_ENVS)):
        env.reset(seed=seeds[i])
        for _ in range(LENGTH):
            owner[np.float32(env.cell.draw)] = i
            env.reset()
    of = np.array([owner[draw] for draw in batch["obs"][:, 0]])
    seen = 0
    for i, env in enumerate(envs):
        for row, alone in replayed(batch, env, np.flatnonzero(of == i), seeds[i]):
            for name, value in alone.items():
                np.testing.assert_array_equal(batch[name][row], value, err_msg=f"{name} {row}")
            seen += 1
    assert seen == batch.count
    ended = batch[FLAGS[0]] | batch[FLAGS[1]]
    assert (numbers >= 1).all()  # no reset is a transition
    if mode == "NEXT_STEP":  # one dummy step for each end, but for those at the fragment's end
        missing = LENGTH * NUM_ENVS - batch.count
        assert ended.sum() - NUM_ENVS <= missing <= ended.sum()
    else:
        assert batch.count == LENGTH * NUM_ENVS
    finished = worker.get_metrics()
    assert sum(m.episode_length for m in finished) <= batch.count
    assert len(finished) == ended.sum()
    assert sum(m.episode_length for m in finished) == numbers[ended].sum()
    worker.stop()


def test_a_lone_sub_environment_gives_whole_fragments() -> None:
    """Its dummy steps would leave fragments of one step without a row."""
    worker = worker_of(lambda: vector("NEXT_STEP", num_envs=1), 1, rollout_fragment_length=1)
    batches = [worker.collect(random_actions=True) for _ in range(30)]
    assert [batch.count for batch in batches] == [1] * 30
    assert sum(batch[FLAGS[0]][0] | batch[FLAGS[1]][0] for batch in batches) > 5


@pytest.mark.parametrize(("name", "message"), [("obs", "observation"), ("rewards", "reward")])
def test_a_number_that_is_not_finite_is_refused_by_sub_environment(
    name: str, message: str, monkeypatch: Any
) -> None:
    env = vector("SAME_STEP", "own")
    step = env.step

    def wrong(actions: Any) -> Any:
        obs, rewards, *rest = step(actions)
        {"obs": obs[:, 0], "rewards": rewards}[name][1] = np.nan
        return obs, rewards, *rest

    monkeypatch.setattr(env, "step", wrong)
    with pytest.raises(NonFiniteError, match=rf"environment 1\): non-finite {message}"):
        worker_of(lambda: env).collect(random_actions=True)


# --- callbacks ---------------------------------------------------------------------------------


class Diary(RLlibCallback):
    """Notes what callbacks see, by environment."""

    notes: dict[int, list[Any]] = {}  # noqa: RUF012

    def _note(self, what: str, episode: Any, env_index: int) -> None:
        last = episode.last_observation_for(), episode.last_action_for(), episode.last_info_for()
        obs, action, info = copy.deepcopy(last)
        entry = what, episode.length, episode.total_reward, obs.tolist(), info
        self.notes.setdefault(env_index, []).append((*entry, np.array(action).tolist()))

    def on_episode_start(self, *, episode: Any, env_index: int, **others: Any) -> None:
        self._note("start", episode, env_index)

    def on_episode_step(self, *, episode: Any, env_index: int, **others: Any) -> None:
        self._note("step", episode, env_index)

    def on_episode_end(self, *, episode: Any, env_index: int, env: Any, **others: Any) -> None:
        self._note("end", episode, env_index)
        episode.custom_metrics["number"] = episode.last_info_for()["number"]
        assert isinstance(env, Drawn | SyncVectorEnv)


@pytest.mark.parametrize("mode", MODES)
def test_callbacks_see_each_episode_as_that_of_one_environment(mode: str, monkeypatch: Any) -> None:
    notes, metrics = [], []
    for make in (lambda: vector(mode), Drawn):
        monkeypatch.setattr(Diary, "notes", {})
        worker = worker_of(make, callbacks_class=Diary)
        # Actions that do not depend on the steps that others skip.
        monkeypatch.setattr(worker, "_act", lambda random: np.full((NUM_ENVS, 2), 0.5, np.float32))
        worker.collect()
        notes.append(Diary.notes)
        metrics.append(sorted(m.custom_metrics["number"] for m in worker.get_metrics()))
    found, expected = notes
    assert found.keys() == expected.keys() == set(range(NUM_ENVS))
    for i in range(NUM_ENVS):
        shorter = min(len(found[i]), len(expected[i]))
        assert found[i][:shorter] == expected[i][:shorter]
        assert shorter > LENGTH
    if mode != "NEXT_STEP":
        assert (found, metrics[0]) == (expected, metrics[1])


def test_infos_without_masks_are_everybodys(monkeypatch: Any) -> None:
    monkeypatch.setattr(Diary, "notes", {})
    monkeypatch.setattr(Diary, "on_episode_end", RLlibCallback.on_episode_end)
    worker = worker_of(lambda: vector("DISABLED", "own"), callbacks_class=Diary)
    worker.collect(random_actions=True)
    for what, _, _, obs, info, _ in Diary.notes[1]:
        assert info["first" if what == "start" else "number"] == obs[1 if what == "start" else 2]


# --- evaluation --------------------------------------------------------------------------------


def act(obs: Any) -> tuple[Any, Any]:
    """Acts on the observation alone."""
    return np.tanh(obs[:, :2] - obs[:, 2:]), obs[:, 0]


@pytest.mark.parametrize("num_episodes", [2, 8])
@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_plays_the_episodes_of_its_seeds(mode: str, num_episodes: int) -> None:
    """As many as asked for, one for each seed, however long the others are."""
    seeds = list(range(100, 100 + num_episodes))
    batch = EnvBatch(vector(mode), "Tested")
    found = episodes.run_episodes(batch, act, SCALE, seeds, "Tested")
    expected = episodes.run_episodes(singles(NUM_ENVS), act, SCALE, seeds, "Tested")
    assert found == expected
    assert len({episode.length for episode in found}) > 1


def test_an_endless_episode_of_a_vector_is_cut_off(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(episodes, "MAX_EPISODE_STEPS", 9)
    monkeypatch.setattr(vectors, "LENGTHS", (10**6, 10**6))
    played = episodes.run_episodes(EnvBatch(Own(), "T"), act, SCALE, [1, 2, 3, 4], "Tested")
    assert [(e.length, e.terminated) for e in played] == [(9, False)] * 4
    assert "4 of 4 episodes were cut off after 9 steps" in caplog.text


# --- what a vector environment may not do ------------------------------------------------------


GOOD = (np.zeros((3, 4)), np.zeros(3), np.zeros(3, bool), np.zeros(3, bool), {})


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, np.zeros((3, 5)), r"the observations .*shape \(3, 5\)\), but .*have shape \(3, 4\)"),
        (0, np.zeros((2, 4)), r"the observations .*have shape \(3, 4\)"),
        (0, np.full((3, 4), "a"), "the observations"),
        (1, np.zeros((3, 1)), r"rewards as .*\(3, 1\)\), but .*shape \(3,\)"),
        (1, None, "rewards as None"),
        (2, [None] * 3, "terminations as "),
        (3, np.zeros(2, bool), "truncations as "),
        (4, [], r"infos as \[\]"),
        (2, np.ones(3, bool), r"infos with no names at an episode's end, but .*SAME_STEP"),
    ],
)
def test_a_wrong_step_of_a_vector_is_refused(
    position: int, value: Any, message: str, monkeypatch: Any
) -> None:
    env = vector("SAME_STEP", "own")
    returned = (*GOOD[:position], value, *GOOD[position + 1 :])
    monkeypatch.setattr(env, "step", lambda actions: returned)
    with pytest.raises(UnusableOutcome, match=rf"Tested: its step returned {message}"):
        worker_of(lambda: env).collect(random_actions=True)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (GOOD[0], r"its reset returned array.* but reset\(seed=…, options=…\) of a vector"),
        ((GOOD[0], None), r"its reset returned a tuple of 2 .*infos a dict"),
        ((np.zeros((3, 1)), {}), r"its reset returned the observations .*have shape \(3, 4\)"),
    ],
)
def test_a_wrong_reset_of_a_vector_is_refused(
    returned: Any, message: str, monkeypatch: Any
) -> None:
    env = vector("SAME_STEP", "own")
    monkeypatch.setattr(env, "reset", lambda seed: returned)
    with pytest.raises(UnusableOutcome, match=f"Tested: {message}"):
        worker_of(lambda: env).collect(random_actions=True)


def test_a_step_of_another_length_is_refused(monkeypatch: Any) -> None:
    env = vector("SAME_STEP", "own")
    monkeypatch.setattr(env, "step", lambda actions: GOOD[:4])
    with pytest.raises(UnusableOutcome, match=r"its step returned a tuple of 4 .*truncations, "):
        worker_of(lambda: env).collect(random_actions=True)


def test_an_end_in_the_place_of_a_reset_is_refused(monkeypatch: Any) -> None:
    env = vector("NEXT_STEP", "own")
    monkeypatch.setattr(env, "step", lambda actions: (*GOOD[:3], np.ones(3, bool), {}))
    with pytest.raises(UnusableOutcome, match=r"autoreset_mode.*NEXT_STEP, where"):
        worker_of(lambda: env).collect(random_actions=True)


@pytest.mark.parametrize("mode", [None, "SameStepp"])
def test_an_unknown_mode_is_refused(mode: Any) -> None:
    env = vector("SAME_STEP", "own")
    env.metadata = {} if mode is None else {"autoreset_mode": mode}
    with pytest.raises(ValueError, match=rf"{mode}.*NEXT_STEP .* SAME_STEP .* DISABLED"):
        EnvBatch(env, "Tested")


def test_a_modes_value_will_do() -> None:
    env = vector("SAME_STEP", "own")
    env.metadata = {"autoreset_mode": "SameStep"}
    assert EnvBatch(env, "Tested").mode is AutoresetMode.SAME_STEP


def test_a_vector_without_its_attributes_is_refused() -> None:
    env = Own()
    del env.num_envs
    with pytest.raises(ValueError, match=r"attributes num_envs .found None"):
        EnvBatch(env, "Tested")


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_an_exception_names_the_vector(monkeypatch: Any, error: type[BaseException]) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("jammed")

    env = Own()
    for name in ("step", "reset"):
        monkeypatch.setattr(env, name, fail)
        words = rf"Tested: {error.__name__}: jammed .*in its {name}"
        with pytest.raises(EnvironmentFailure, match=words):
            worker_of(lambda: env).collect(random_actions=True)


def test_another_number_of_sub_environments_is_refused_in_training_alone() -> None:
    with pytest.raises(ValueError, match=r"num_envs=3, but num_envs_per_env_runner=5\. Set"):
        worker_of(Own, 5)
    evaluation = worker_of(Own, 5, in_evaluation=True)
    assert len(evaluation.evaluate_episodes([1, 2, 3, 4], 0)) == 4


def test_one_sub_environment_cannot_be_restarted() -> None:
    with pytest.raises(ValueError, match="restart_failed_sub_environments=True is not possible"):
        worker_of(Own, restart_failed_sub_environments=True)


def test_running_statistics_are_found_in_vectors() -> None:
    inside = SyncVectorEnv([lambda: gym.wrappers.NormalizeReward(Drawn())])
    for env in (gym.wrappers.vector.NormalizeObservation(vector("NEXT_STEP")), inside):
        with pytest.raises(ValueError, match=r"Tested: The wrapper Normalize\w+ is not supported"):
            check_environment(EnvBatch(env, "Tested"), "Tested")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("NormalizeObservation", "train with normalize_observations=true, whose"),
        ("NormalizeReward", "scale by a fixed"),
    ],
)
def test_running_statistics_have_a_substitute_that_suits_vectors(name: str, advice: str) -> None:
    wrapper = getattr(gym.wrappers.vector, name)(vector("NEXT_STEP"))
    with pytest.raises(ValueError, match=rf"Instead {advice}") as error:
        check_environment(EnvBatch(wrapper, "Tested"), "Tested")
    assert "normalize_rewards" not in str(error.value)  # PPO and SPO take no vectors
    assert "gymnasium.wrappers.vector.Transform" in str(error.value)


# --- how it is made ----------------------------------------------------------------------------


def test_what_makes_a_vector_is_given_the_number() -> None:
    tune.register_env("vectors-sync", vectors.sync)
    tune.register_env("vectors-fixed", lambda config: Own(num_envs=5))
    context = EnvContext({}, worker_index=2)
    for env in ("vector_environments:Own-v0", "vector_environments.Own", Own, "vectors-sync"):
        made = environment_maker(env, num_envs=4)(context)
        assert (made.num_envs, type(made)) == (4, EnvBatch)
    assert environment_maker("vectors-fixed", num_envs=4)(context).num_envs == 5
    assert (
        "vectors-fixed (worker 2)" in environment_maker("vectors-fixed", num_envs=4)(context).where
    )
    given = environment_maker("Own-v0", num_envs=4)(
        EnvContext({"num_envs": 2, "mode": "DISABLED"}, 0)
    )
    assert (given.num_envs, given.mode) == (2, AutoresetMode.DISABLED)


def test_an_id_with_two_entry_points_makes_what_the_algorithm_can_step() -> None:
    context = EnvContext({}, worker_index=0)
    assert isinstance(environment_maker("Both-v0", num_envs=2)(context), EnvBatch)
    for make in (
        environment_maker("Both-v0"),
        environment_maker("Both-v0", 2, num_envs=2),  # a vector environment cannot be wrapped
        environment_maker("Both-v0", wrappers=[f"{__name__}:unchanged"], num_envs=2),
    ):
        assert not isinstance(make(context), EnvBatch)


def test_an_ids_time_limit_is_known(caplog: Any) -> None:
    check_environment(environment_maker("Own-v0", num_envs=2)(EnvContext({}, 0)), "Own-v0")
    assert "time limit" not in caplog.text
    limited = SyncVectorEnv([lambda: gym.wrappers.TimeLimit(Drawn(), 3)])
    check_environment(EnvBatch(limited, "Limited"), "Limited")
    assert "time limit" not in caplog.text
    check_environment(EnvBatch(Own(), "Own, endless"), "Own, endless")
    assert "time limit" in caplog.text


@pytest.mark.parametrize("name", ["ppo", "spo", "sac"])
def test_rllibs_own_workers_refuse_vectors(name: str) -> None:
    config = ALGORITHMS[name].load().get_default_config()
    for env in (Own, "vector_environments.Own", "Own-v0"):
        with pytest.raises(ValueError, match=r"is a vector environment .* PPO, SPO and SAC"):
            config.copy().environment(env).validate()
    made = environment_maker("vector_environments.Own")(EnvContext({}, 0))
    with pytest.raises(ValueError, match=r"is a vector environment .* PPO, SPO and SAC"):
        ALGORITHMS[name].load().validate_env(made, EnvContext({}, 0))


def unchanged(env: Any) -> Any:
    return env


def plan_of(env: str, **options: Any) -> Any:
    given = {"preset": None, "seed": 0, "env_steps": 100, "eval_interval": 50, "num_gpus": 0}
    given |= {"num_env_runners": 0, "num_envs_per_env_runner": 4, "settings": []}
    return make_plan(env=env, **(given | options))


def test_a_plan_says_what_does_not_fit_before_anything_starts() -> None:
    tune.register_env("vectors-fixed", lambda config: Own(num_envs=5))
    assert plan_of("vector_environments:Own-v0").num_envs_per_env_runner == 4
    with pytest.raises(ValueError, match=r"num_envs=5, but num_envs_per_env_runner=4\. Set"):
        plan_of("vectors-fixed")
    for algo in ("ppo", "spo", "sac"):
        with pytest.raises(ValueError, match="PPO, SPO and SAC"):
            plan_of("vector_environments:Own-v0", algo=algo)
        experiment = {"name": "e", "algorithm": ["qvpo", algo], "seeds": [0], "env_steps": 100,
                      "workers": {"num_envs_per_env_runner": 5}}  # fmt: skip
        for task in ("vector_environments:Own-v0", "vectors-fixed"):
            with pytest.raises(ValueError, match=f"task.*{task} is a .* PPO, SPO and SAC"):
                ExperimentSpec.from_dict(experiment | {"task": task})
    assert ExperimentSpec.from_dict(
        experiment | {"algorithm": "td3", "task": "vectors-fixed"}
    ).tasks
