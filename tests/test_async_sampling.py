"""Sampling and evaluation beside the learner: ledger, staleness, checkpoints, results."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from tracing import Trace

TRACEABLE = "environments:Traceable-v0"
ENV = "InvertedPendulum-v5"
FRAGMENT = 64  # env steps


def two_workers(config: Any, num_envs: int = 4) -> Any:
    return config.env_runners(num_env_runners=2, num_envs_per_env_runner=num_envs)


def flat(policy: Any) -> np.ndarray:
    return np.concatenate([value.ravel() for value in policy.get_weights().values()])


@pytest.mark.parametrize(
    ("num_envs", "num_workers", "mode", "length"),
    [(1, 0, "async", 1), (1, 2, "sync", 1), (1, 2, "async", 64), (64, 2, "async", 1),
     (20, 2, "async", 4)],
)  # fmt: skip
def test_length_of_a_fragment(
    tiny_config: Any, num_envs: int, num_workers: int, mode: str, length: int
) -> None:
    config = tiny_config(ENV, sampling_mode=mode)
    config.env_runners(num_env_runners=num_workers, num_envs_per_env_runner=num_envs)
    assert config.get_rollout_fragment_length() == length
    assert config.env_runners(rollout_fragment_length=7).get_rollout_fragment_length() == 7


@pytest.fixture(scope="module")
def traced(build_shared: Any, tiny_config: Any) -> Any:
    """An algorithm with two workers, for two tests, and its trace from the first transition on."""
    algorithm = build_shared(two_workers(tiny_config(TRACEABLE, update_ratio=0.3)))
    return algorithm, Trace(algorithm)


def test_the_ledger_is_exact_and_weights_arrive(traced: Any) -> None:
    algorithm, trace = traced
    initial = flat(algorithm.policy)
    for _ in range(10):
        result = algorithm.train()
        trace.check()
        assert 0 <= result["ledger"]["staleness_mean"] <= result["ledger"]["staleness_max"]
    assert result["ledger"]["staleness_max"] > 0
    assert result["env_runners"]["episode_len_mean"] == 50
    algorithm.drain()
    trace.check()
    collector = algorithm.collector
    assert collector.pool.num_asked() == 0
    latest = flat(algorithm.policy)
    workers = algorithm.env_runner_group.foreach_env_runner(
        lambda worker: flat(worker.policy), local_env_runner=False
    )
    for weights in workers:  # they have acted with those of some updates ago
        assert 0 < np.abs(weights - latest).max() < np.abs(latest - initial).max()


def test_a_checkpoint_holds_what_was_in_flight(build: Any, traced: Any, tmp_path: Path) -> None:
    original, trace = traced
    try:
        original.train()
        before = original.ledger.ingested
        original.save(str(tmp_path))
        trace.check()
        seen = dict(trace.last_step)  # what the checkpoint has; what follows may be collected again
        assert before < original.ledger.ingested <= before + 4 * FRAGMENT
        original.train()
        trace.check()
        restored = build(original.config.copy(copy_frozen=False))
        restored.train()  # what is in flight now belongs to another run
        restored.restore(str(tmp_path))
        trace = Trace(restored)
        trace.last_step.update(seen)
        restored.train()
        assert trace.repeated == 0
        assert restored.ledger.done == int(0.3 * (restored.ledger.ingested - 40))
    finally:
        original.stop()  # the later tests need its workers' places


def test_staleness_keeps_to_its_bound(build: Any, tiny_config: Any) -> None:
    config = two_workers(tiny_config(TRACEABLE, update_ratio=0.3, max_staleness=20))
    algorithm = build(config.reporting(min_sample_timesteps_per_iteration=200))
    trace = Trace(algorithm)
    for _ in range(3):
        result = algorithm.train()
        trace.check()
        assert result["ledger"]["staleness_max"] <= 20
    assert result["faults"]["fragments_lost"] == 0


def evaluating(tiny_config: Any, *, parallel: bool) -> Any:
    config = tiny_config(ENV).evaluation(
        evaluation_interval=1,
        evaluation_duration=5,
        evaluation_num_env_runners=2,
        evaluation_parallel_to_training=parallel,
        evaluation_config={"explore": False, "num_envs_per_env_runner": 2},
    )
    return config.reporting(min_sample_timesteps_per_iteration=60)


@pytest.fixture(scope="module")
def after(build_shared: Any, tiny_config: Any) -> Any:
    """An algorithm that evaluates after each iteration."""
    return build_shared(evaluating(tiny_config, parallel=False))


def test_evaluation_beside_training_changes_neither(
    build: Any, tiny_config: Any, after: Any
) -> None:
    beside = build(evaluating(tiny_config, parallel=True))
    expected = [after.train(), after.train()]
    found = [beside.train() for _ in range(3)]
    for earlier, later in zip(expected, found[1:], strict=True):
        # Beside an iteration, the policy that it begins with is evaluated.
        returns = later["evaluation"]["env_runners"]["hist_stats"]["episode_reward"]
        assert returns == earlier["evaluation"]["env_runners"]["hist_stats"]["episode_reward"]
        assert len(returns) == 5
    after.train()
    for name, weights in after.policy.get_weights().items():
        np.testing.assert_array_equal(weights, beside.policy.get_weights()[name], err_msg=name)
    niceness = beside.eval_env_runner_group.foreach_env_runner(
        lambda worker: os.nice(0), local_env_runner=False
    )
    of_rays_workers = ray.get(ray.remote(num_cpus=0)(lambda: os.nice(0)).remote())
    assert niceness == [min(19, of_rays_workers + 10)] * 2


def test_the_episodes_of_a_dead_evaluation_worker_are_played_by_another(after: Any) -> None:
    expected = after.evaluate()["env_runners"]["hist_stats"]["episode_reward"]
    group = after.eval_env_runner_group
    group._worker_manager.actors()[1].apply.remote(lambda worker: os._exit(1))
    found = after.evaluate()["env_runners"]["hist_stats"]["episode_reward"]
    assert found == expected
    assert group.num_healthy_remote_env_runners() == 1
