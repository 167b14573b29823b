"""Training through RLlib: the ledger, the warm-up, time limits, action scaling, seeds, replay."""

import itertools
import logging
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from scipy import stats

import qvpo_rllib.runtime.algorithm
from qvpo_rllib.core.seeding import Stream, spawn_seed

WARMUP = 40
COUNTING = "environments:Counting-v0"


def two_workers_config(tiny_config: Any) -> Any:
    config = tiny_config(update_ratio=0.5, sampling_mode="sync")
    return config.env_runners(num_env_runners=2, num_envs_per_env_runner=3)


def columns_of(algorithm: Any) -> dict[str, np.ndarray]:
    return {
        name: c.numpy().copy() for name, c in reference.in_order(algorithm.replay)._asdict().items()
    }


def episode_returns(result: dict[str, Any]) -> list[float]:
    return list(result["env_runners"]["hist_stats"]["episode_reward"])


def identity_of(algorithm: Any, results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Everything that a seed determines, by name."""
    networks = algorithm.policy.networks.state_dict()
    return {
        **{f"weights/{name}": value.numpy().copy() for name, value in networks.items()},
        **{f"replay/{name}": column for name, column in columns_of(algorithm).items()},
        "returns": np.array([r for result in results for r in episode_returns(result)]),
    }


def assert_identical(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


@pytest.fixture(scope="module")
def local_run(
    build_shared: Any, tiny_config: Any
) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """Four iterations of 60 env steps in this process, and their identity."""
    algorithm = build_shared(tiny_config())
    results = [algorithm.train() for _ in range(4)]
    return algorithm, results, identity_of(algorithm, results)


@pytest.fixture(scope="module")
def two_workers_run(build_shared: Any, tiny_config: Any) -> tuple[Any, list[dict[str, Any]], Any]:
    """Four iterations of 60 env steps on two workers with three environments each."""
    algorithm = build_shared(two_workers_config(tiny_config))
    results = [algorithm.train() for _ in range(4)]
    return algorithm, results, identity_of(algorithm, results)


# --- the update ratio --------------------------------------------------------------------------


def assert_ledger_exact(algorithm: Any, ratio: str) -> None:
    ledger = algorithm.ledger
    expected = max(0, math.floor(Fraction(ratio) * (ledger.ingested - WARMUP)))
    assert ledger.done == expected == algorithm.learner.num_updates


@pytest.mark.parametrize(
    ("ratio", "num_workers"),
    # With two workers: tests/test_async_sampling.py.
    [("1.0", 0), ("0.5", 0), ("0.3", 0), ("2.0", 0), ("2.0", 1)],
)
def test_update_ratio_is_exact_after_every_iteration(
    build: Any, tiny_config: Any, ratio: str, num_workers: int
) -> None:
    config = tiny_config(update_ratio=float(ratio), warmup_steps=WARMUP)
    config.env_runners(num_env_runners=num_workers, num_envs_per_env_runner=3)
    config.reporting(min_sample_timesteps_per_iteration=23)
    algorithm = build(config)
    for _ in range(4):
        result = algorithm.train()
        assert_ledger_exact(algorithm, ratio)
        assert result["ledger"]["ingested"] == result["num_env_steps_sampled_lifetime"]
        assert result["ledger"]["done"] == algorithm.ledger.done
    assert algorithm.ledger.ingested >= 4 * 23
    assert algorithm.ledger.done > 0


# --- the warm-up -------------------------------------------------------------------------------


def test_warm_up_is_uniformly_random_and_without_updates(build: Any, tiny_config: Any) -> None:
    config = tiny_config("Hopper-v5", warmup_steps=600)
    config.env_runners(num_envs_per_env_runner=2)
    config.reporting(min_sample_timesteps_per_iteration=600)
    algorithm = build(config)
    before = algorithm.policy.get_weights()
    result = algorithm.train()
    assert (algorithm.ledger.ingested, algorithm.ledger.done) == (600, 0)
    assert result["info"]["learner"]["default_policy"]["learner_stats"] == {}
    for name, value in algorithm.policy.get_weights().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    actions = columns_of(algorithm)["action"]
    assert actions.shape == (600, 3)
    assert (np.abs(actions) <= 1).all()
    for dimension in actions.T:
        assert stats.kstest(dimension, stats.uniform(-1, 2).cdf).pvalue > 0.01
    assert np.abs(np.corrcoef(actions.T) - np.eye(3)).max() < 0.15

    result = algorithm.train()
    assert algorithm.ledger.done == 600
    assert result["info"]["learner"]["default_policy"]["learner_stats"]["critic_loss"] > 0


# --- time limits -------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation_as_terminal", [False, True])
def test_time_limits_in_the_replay(
    build: Any, tiny_config: Any, truncation_as_terminal: bool
) -> None:
    """Even episodes of `Counting` end by truncation at step 5, odd ones by termination."""
    config = tiny_config(COUNTING, truncation_as_terminal=truncation_as_terminal)
    algorithm = build(config)
    algorithm.train()
    replay = columns_of(algorithm)
    assert len(replay["terminal"]) == 60
    first_episode = int(replay["obs"][0, 0])  # RLlib resets an environment when it makes it
    for row in range(60):
        episode, step = first_episode + row // 5, row % 5
        np.testing.assert_array_equal(replay["obs"][row], [episode, step])
        # At the end of an episode too: its final observation, not the next episode's first.
        np.testing.assert_array_equal(replay["next_obs"][row], [episode, step + 1])
        ends, truncated = step == 4, episode % 2 == 0
        bootstraps = truncated and not truncation_as_terminal
        assert replay["terminal"][row] == (ends and not bootstraps)
    assert episode_returns(algorithm.train())[-1] == 5.0


# --- action scaling ----------------------------------------------------------------------------


def test_stored_actions_are_scaled_to_a_lopsided_box(build: Any, tiny_config: Any) -> None:
    algorithm = build(tiny_config("environments:RecordingActions-v0"))
    algorithm.train()
    algorithm.train()
    env = algorithm.env_runner.envs[0].unwrapped
    received = np.stack(env.received)[-120:]
    low, high = np.array([-2.0, 0.0, 10.0]), np.array([1.0, 5.0, 10.5])
    stored = columns_of(algorithm)["action"]
    assert algorithm.ledger.done == 80  # both random and learnt actions
    np.testing.assert_allclose(
        received, low + (stored + 1) / 2 * (high - low), rtol=1e-5, atol=1e-6
    )
    assert env.action_space.contains(received.min(axis=0))
    assert env.action_space.contains(received.max(axis=0))
    # The whole box is used: the random actions alone come near each of its sides.
    assert (received.min(axis=0) < low + 0.15 * (high - low)).all()
    assert (received.max(axis=0) > high - 0.15 * (high - low)).all()
    action = algorithm.compute_single_action(np.zeros(2, np.float32), explore=False)
    assert env.action_space.contains(np.asarray(action, np.float32))


def test_humanoids_actions_stay_within_its_bounds(
    build: Any, tiny_config: Any, monkeypatch: Any
) -> None:
    algorithm = build(tiny_config("Humanoid-v5", warmup_steps=30))
    env = algorithm.env_runner.envs[0]
    received = []
    step = env.step
    monkeypatch.setattr(env, "step", lambda a: received.append(np.array(a)) or step(a))
    algorithm.train()
    stored = columns_of(algorithm)["action"]
    assert np.stack(received).shape == stored.shape == (60, 17)
    np.testing.assert_allclose(received, 0.4 * stored, atol=1e-6)
    assert 0.39 < np.abs(received).max() <= np.float32(0.4)


# --- seeds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_seed_decides_a_local_run(
    build: Any, tiny_config: Any, local_run: Any, seed: int, same: bool
) -> None:
    _, _, expected = local_run
    algorithm = build(tiny_config().debugging(seed=seed))
    torch.randn(seed + 3)  # the global generator must not matter
    np.random.rand(3)  # noqa: NPY002
    found = identity_of(algorithm, [algorithm.train() for _ in range(4)])
    if same:
        assert len(expected["returns"]) > 5
        assert_identical(found, expected)
    else:
        assert not np.array_equal(found["replay/obs"][0], expected["replay/obs"][0])
        assert not np.array_equal(found["replay/action"], expected["replay/action"])
        name = "weights/actor.mlp.layers.0.weight"
        assert not np.array_equal(found[name], expected[name])


def test_seed_decides_a_run_with_two_workers(
    build: Any, tiny_config: Any, two_workers_run: Any
) -> None:
    """That another seed changes every stream of every worker: tests/test_tune_seeds.py."""
    _, _, expected = two_workers_run
    algorithm = build(two_workers_config(tiny_config))
    found = identity_of(algorithm, [algorithm.train() for _ in range(4)])
    assert_identical(found, expected)


def test_every_environment_has_a_seed_of_its_own() -> None:
    keys = itertools.product(range(5), range(4), range(4))
    seeds = [spawn_seed(seed, Stream.ENVIRONMENT, worker, env) for seed, worker, env in keys]
    assert len(set(seeds)) == 80


def test_workers_use_the_environments_seeds(two_workers_run: Any) -> None:
    first_observations = columns_of(two_workers_run[0])["obs"][:6]
    assert len(np.unique(first_observations, axis=0)) == 6
    first_actions = columns_of(two_workers_run[0])["action"][:6]
    assert len(np.unique(first_actions)) == 6


# --- workers -----------------------------------------------------------------------------------


def test_two_workers_fill_the_replay(two_workers_run: Any) -> None:
    _, results, identity = two_workers_run
    replay = {name: identity[f"replay/{name}"] for name in ("obs", "next_obs", "terminal")}
    assert [result["replay_size"] for result in results] == [60, 120, 180, 240]
    assert results[-1]["ledger"]["ingested"] == len(replay["terminal"]) == 240
    # Each step adds worker 1's three environments, then worker 2's: every environment's rows
    # follow on from one another until its episode ends.
    for i in range(6):
        obs, next_obs = replay["obs"][i::6], replay["next_obs"][i::6]
        ended = replay["terminal"][i::6].astype(bool)
        assert ended.any()
        np.testing.assert_array_equal(obs[1:][~ended[:-1]], next_obs[:-1][~ended[:-1]])
        assert (obs[1:][ended[:-1]] != next_obs[:-1][ended[:-1]]).any()
    assert sum(len(episode_returns(result)) for result in results) >= replay["terminal"].sum()


def test_workers_act_with_the_learners_weights(two_workers_run: Any) -> None:
    algorithm = two_workers_run[0]
    before = algorithm.policy.get_weights()
    algorithm.train()
    after = algorithm.policy.get_weights()
    name = "actor.mlp.layers.0.weight"
    assert not np.array_equal(after[name], before[name])
    algorithm.training_step()
    workers = algorithm.env_runner_group.foreach_env_runner(
        lambda worker: worker.policy.get_weights(), local_env_runner=False
    )
    assert len(workers) == 2
    for weights in workers:
        assert_identical(weights, after)
    assert not np.array_equal(algorithm.policy.get_weights()[name], after[name])


# --- checkpoints -------------------------------------------------------------------------------


def assert_equal_states(found: Any, expected: Any, name: str = "state") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_equal_states(found[key], value, f"{name}/{key}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), name
    else:
        assert found == expected, name


def test_restored_run_has_the_same_state_and_goes_on(
    build: Any, tiny_config: Any, local_run: Any, tmp_path: Path
) -> None:
    original, _, _ = local_run
    path = original.save(str(tmp_path)).checkpoint.path
    restored = build(tiny_config().debugging(seed=7))
    restored.restore(path)
    assert_equal_states(restored.learner.state_dict(), original.learner.state_dict())
    assert_equal_states(restored.replay.state_dict(), original.replay.state_dict())
    assert_identical(columns_of(restored), columns_of(original))
    assert restored.ledger == original.ledger
    assert restored.iteration == original.iteration
    assert torch.equal(restored.policy.generator.get_state(), original.policy.generator.get_state())
    result = restored.train()
    assert_ledger_exact(restored, "1.0")
    assert result["num_env_steps_sampled_lifetime"] == restored.ledger.ingested == 300
    assert result["training_iteration"] == original.iteration + 1


def test_checkpoint_without_replay_fills_it_anew_before_updates(
    build: Any, tiny_config: Any, tmp_path: Path
) -> None:
    config = tiny_config().training(replay_in_checkpoints=False)
    original = build(config)
    original.train()
    assert original.ledger.done == 20
    path = Path(original.save(str(tmp_path)).checkpoint.path)
    assert not (path / "replay").exists()
    restored = build(config.copy())
    restored.train()  # what it held must not be mixed with the checkpoint's run
    restored.restore(str(path))
    assert len(restored.replay) == 0
    restored.train()
    assert restored.ledger.ingested == 120
    assert restored.ledger.done == 20 + (60 - WARMUP)


# --- memory ------------------------------------------------------------------------------------


def test_replay_is_announced_in_bytes(build: Any, tiny_config: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "qvpo_rllib")
    build(tiny_config(replay_capacity=1234))
    # obs and next_obs of 4, an action of 1, reward and terminal, of 4 bytes each
    assert f"{1234 * 11 * 4:,} bytes" in caplog.text


def test_replay_that_does_not_fit_is_refused_before_it_is_allocated(
    ray_session: None, tiny_config: Any, monkeypatch: Any
) -> None:
    def allocate(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the replay was allocated")

    monkeypatch.setattr(qvpo_rllib.runtime.algorithm, "ReplayBuffer", allocate)
    with pytest.raises(ValueError, match=r"replay_capacity=1000000000000 .*44,000,000,000,000"):
        tiny_config(replay_capacity=10**12).build_algo()
