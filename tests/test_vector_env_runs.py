"""Whole runs on vector environments: training, resume, evaluation, in all off-policy algorithms."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import reference
import vector_environments as vectors
from ray import tune
from test_seven_algorithms import TINY
from test_vector_envs import NUM_ENVS, plan_of, vector, worker_of
from vector_environments import MODES

from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.checkpoints import worker_state
from qvpo_rllib.play import evaluation
from qvpo_rllib.play.evaluation import evaluate_checkpoint
from qvpo_rllib.rollout import episodes
from qvpo_rllib.rollout.env_batch import EnvBatch
from qvpo_rllib.training.run import TrainingRun
from qvpo_rllib.training.run_directory import RunDirectory


def config_of(tiny_config: Any, env: Any, mode: str, **training: Any) -> Any:
    config = tiny_config(env, **training).environment(env_config={"mode": mode})
    return config.env_runners(num_envs_per_env_runner=NUM_ENVS)


def columns_of(algorithm: Any) -> dict[str, np.ndarray]:
    columns = reference.in_order(algorithm.replay)._asdict()
    return {name: column.numpy().copy() for name, column in columns.items()}


def check_replay(columns: dict[str, np.ndarray]) -> None:
    """Each row goes on by one step in the same episode."""
    obs, following = columns["obs"], columns["next_obs"]
    np.testing.assert_array_equal(following[:, :2], obs[:, :2])
    np.testing.assert_array_equal(following[:, 2], obs[:, 2] + 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["qvpo", "dipo", "qsm", "td3"])
def test_off_policy_algorithms_train_and_evaluate(build: Any, name: str, mode: str) -> None:
    small = {"hidden": (8,), "batch_size": 8, "warmup_steps": 20, "replay_capacity": 500}
    small |= {} if name == "td3" else {"diffusion_steps": 2}
    config = ALGORITHMS[name].load().get_default_config().environment("vector_environments.Own")
    config.environment(env_config={"mode": mode}).debugging(seed=0, log_level="ERROR")
    config.training(**small, engine="eager").env_runners(num_envs_per_env_runner=NUM_ENVS)
    config.reporting(min_sample_timesteps_per_iteration=30)
    config.evaluation(evaluation_interval=1, evaluation_duration=4)
    algorithm = build(config)
    results = [algorithm.train() for _ in range(2)]
    check_replay(columns_of(algorithm))
    ledger = results[-1]["ledger"]
    assert ledger["ingested"] == len(columns_of(algorithm)["obs"]) >= 60
    assert ledger["done"] == ledger["ingested"] - 20
    assert algorithm.eval_env_runner.num_envs == 4
    assert len(results[-1]["evaluation"]["env_runners"]["hist_stats"]["episode_reward"]) == 4


@pytest.mark.parametrize("sampling_mode", [pytest.param("sync", marks=pytest.mark.slow), "async"])
def test_remote_workers_step_vectors(build: Any, tiny_config: Any, sampling_mode: str) -> None:
    config = config_of(
        tiny_config, "vector_environments.Own", "NEXT_STEP", sampling_mode=sampling_mode
    )
    config.env_runners(num_env_runners=2, num_cpus_per_env_runner=0.5)
    num_evaluating = int(sampling_mode == "sync")
    config.evaluation(
        evaluation_interval=1, evaluation_duration=5, evaluation_num_env_runners=num_evaluating
    )
    algorithm = build(config)
    results = [algorithm.train() for _ in range(2)]
    columns = columns_of(algorithm)
    check_replay(columns)
    assert results[-1]["ledger"]["ingested"] == len(columns["obs"]) >= 120
    assert results[-1]["ledger"]["done"] == len(columns["obs"]) - algorithm.hp.warmup_steps
    names = {tuple(row) for row in columns["obs"][:, :3]}
    assert len(names) == len(columns["obs"])  # no transition came twice
    assert results[-1]["evaluation"]["env_runners"]["num_episodes"] == 5


@pytest.mark.parametrize("kind", ["sync", "own"])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_goes_on_to_the_last_bit(
    build: Any, tiny_config: Any, tmp_path: Path, mode: str, kind: str, caplog: Any
) -> None:
    tune.register_env("vectors-sync", vectors.sync)
    env = {"sync": "vectors-sync", "own": "vector_environments.Own"}[kind]
    config = config_of(tiny_config, env, mode)
    original = build(config)
    original.train()
    path = original.save(str(tmp_path)).checkpoint.path
    original.train()
    restored = build(config.copy())
    restored.restore(path)
    restored.train()
    assert "new episode" not in caplog.text
    expected = columns_of(original)
    for name, column in columns_of(restored).items():
        np.testing.assert_array_equal(column, expected[name], err_msg=name)


def test_a_run_goes_on_at_its_env_steps(ray_session: None, tmp_path: Path) -> None:
    """Iterations in the mode NEXT_STEP do not end at multiples of their least env steps."""
    settings = ["hidden=8", "engine=eager", "warmup_steps=400", "replay_capacity=500"]
    plan = plan_of("vector_environments:Own-v0", algo="td3", settings=settings)
    found = {}
    for name, ends in (("whole", (100,)), ("in two", (50, 100))):
        resume = False
        for end in ends:
            part = dataclasses.replace(plan, env_steps=end)
            run = (
                RunDirectory.open(tmp_path / name, [])
                if resume
                else RunDirectory.create(tmp_path / name, part.to_dict(), [])
            )
            with run:
                training = TrainingRun(part, run, resume=resume)
                training.run()
                training.close()
                found[name] = [row["env_steps"] for row in run.metrics.rows()]
            resume = True
    assert any(steps % plan.iteration_steps() for steps in found["whole"])
    assert found["in two"] == found["whole"]


@pytest.mark.parametrize("kind", ["sync", "own"])
def test_resets_that_are_due_are_saved(kind: str) -> None:
    """In the mode NEXT_STEP an episode that has ended begins with the next step."""
    options = {"rollout_fragment_length": 1}
    original, restored = (worker_of(lambda: vector("NEXT_STEP", kind), **options) for _ in range(2))
    while not 0 < original.batch.waiting.sum() < NUM_ENVS:
        original.collect(random_actions=True)
    saved = worker_state.capture(original)
    assert worker_state.restore(restored, saved.state, env_steps=9) == saved.not_captured == []
    for _ in range(20):
        expected, found = (w.collect(random_actions=True) for w in (original, restored))
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_a_run_whose_simulator_cannot_be_saved_begins_new_episodes(
    build: Any, tiny_config: Any, tmp_path: Path, caplog: Any
) -> None:
    config = config_of(tiny_config, "vector_environments.Elsewhere", "NEXT_STEP")
    original = build(config)
    original.train()
    with caplog.at_level(logging.WARNING, "qvpo_rllib"):
        path = original.save(str(tmp_path)).checkpoint.path
        assert "worker 0, vector environment: TypeError: the state is on" in caplog.text
        restored = build(config.copy())
        caplog.clear()
        restored.restore(path)
    lines = [line for line in caplog.text.splitlines() if "new episodes instead" in line]
    assert len(lines) == 1
    restored.train()
    columns = columns_of(restored)
    check_replay(columns)
    before = original.ledger.ingested
    begun = columns["obs"][before : before + NUM_ENVS]
    assert (begun[:, 2] == 0).all()
    assert not np.isin(begun[:, 0], columns["obs"][:before, 0]).any()


def test_the_number_of_sub_environments_may_change_in_a_resumed_run(
    build: Any, tiny_config: Any, tmp_path: Path, caplog: Any
) -> None:
    config = config_of(tiny_config, "vector_environments.Own", "NEXT_STEP")
    original = build(config)
    original.train()
    path = original.save(str(tmp_path)).checkpoint.path
    restored = build(config.copy().env_runners(num_envs_per_env_runner=5))
    restored.restore(path)
    assert "it has 5 environments, but had 3" in caplog.text
    restored.train()
    check_replay(columns_of(restored))


@pytest.mark.parametrize(("name", "kind"), [("td3", EnvBatch), ("ppo", gym.Env)])
def test_an_id_with_two_entry_points_is_evaluated_as_it_was_trained(
    name: str, kind: type, build: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    config = ALGORITHMS[name].load().get_default_config()
    config.environment("vector_environments:Both-v0").training(**TINY[name])
    algorithm = build(config.env_runners(num_envs_per_env_runner=2).debugging(log_level="ERROR"))
    path = Path(algorithm.save(str(tmp_path)).checkpoint.path)
    made = []
    play = evaluation.run_episodes
    monkeypatch.setattr(
        evaluation, "run_episodes", lambda envs, *args: made.append(envs) or play(envs, *args)
    )
    assert len(evaluate_checkpoint(path, episodes=3).returns) == 3
    (envs,) = made
    assert isinstance(envs[0] if isinstance(envs, list) else envs, kind)


def test_a_checkpoint_is_evaluated_in_a_vector(
    build: Any, tiny_config: Any, tmp_path: Path
) -> None:
    algorithm = build(config_of(tiny_config, "vector_environments.Own", "SAME_STEP"))
    path = Path(algorithm.save(str(tmp_path)).checkpoint.path)
    found = evaluate_checkpoint(path, episodes=4, seed=3)
    assert found.to_dict() == evaluate_checkpoint(path, episodes=4, seed=3).to_dict()
    assert len(found.returns) == 4
    longer = evaluate_checkpoint(path, episodes=12, seed=3)  # in two rounds
    assert len({episode.length for episode in longer.episodes}) > 1
    with pytest.raises(ValueError, match="cannot be recorded: it is a vector environment"):
        evaluate_checkpoint(path, record=lambda env, name: episodes.Hooks())
