"""QVPO is used the way RLlib's users know: config, results, callbacks, checkpoints, Tune."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.policy.policy import Policy
from ray.tune.registry import get_trainable_cls

from qvpo_rllib import QVPO, QVPOConfig, QVPOTorchPolicy
from qvpo_rllib.core.options import options_of
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.training.plan import parse_settings
from qvpo_rllib.training.rows import evaluation_columns

EVALUATION_EPISODES = 3
ENV = "InvertedPendulum-v5"
LEDGER = {"owed": 0, "staleness_mean": 0.0, "staleness_max": 0.0}
OBS = np.array([0.01, -0.02, 0.03, 0.04], np.float32)


class Callbacks(RLlibCallback):
    """Counts what it sees; the counts appear in the results."""

    fragments = 0
    evaluations: list[Any] = []  # noqa: RUF012

    def on_episode_start(self, *, episode: Any, **kwargs: Any) -> None:
        episode.user_data["steps"] = 0

    def on_episode_step(self, *, episode: Any, **kwargs: Any) -> None:
        episode.user_data["steps"] += 1

    def on_episode_end(self, *, episode: Any, **kwargs: Any) -> None:
        episode.custom_metrics["steps"] = episode.user_data["steps"]
        episode.custom_metrics["reward"] = episode.total_reward

    def on_sample_end(self, *, samples: Any, **kwargs: Any) -> None:
        type(self).fragments += 1

    def on_train_result(self, *, algorithm: Any, result: dict[str, Any], **kwargs: Any) -> None:
        result["seen_by_callback"] = algorithm.iteration

    def on_evaluate_end(self, *, evaluation_metrics: dict[str, Any], **kwargs: Any) -> None:
        type(self).evaluations.append(evaluation_metrics)


@pytest.fixture(scope="module")
def trained(build_shared: Any, tiny_config: Any) -> tuple[QVPO, dict[str, Any]]:
    """An algorithm after two iterations of 60 env steps, and the second one's result."""
    config = tiny_config(ENV, k_behavior=2, k_eval=5).callbacks(Callbacks)
    config.evaluation(evaluation_interval=1, evaluation_duration=EVALUATION_EPISODES)
    algorithm = build_shared(config)
    algorithm.train()
    return algorithm, algorithm.train()


@pytest.fixture(scope="module")
def saved(trained: Any, tmp_path_factory: Any) -> Path:
    """A checkpoint of `trained`."""
    directory = tmp_path_factory.mktemp("checkpoint")
    return Path(trained[0].save(str(directory)).checkpoint.path)


@pytest.fixture
def chosen_k(trained: Any, monkeypatch: Any) -> list[int]:
    """The K of every time that the policy acts in this test."""
    calls: list[int] = []
    act = trained[0].policy._act

    def recording(obs: Any, explore: bool, k: int, generator: Any) -> Any:
        calls.append(k)
        return act(obs, explore, k, generator)

    monkeypatch.setattr(trained[0].policy, "_act", recording)
    return calls


def as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


# --- one home of the defaults ------------------------------------------------------------------


@pytest.mark.parametrize("name", options_of(QVPOHyperparameters))
def test_every_option_is_known_to_dataclass_config_and_command_line(name: str) -> None:
    default = getattr(QVPOHyperparameters(), name)
    marker = object()
    parameters = inspect.signature(QVPOConfig.training).parameters
    assert parameters[name].default == default
    assert getattr(QVPOConfig(), name) == default
    assert getattr(QVPOConfig().training(**{name: marker}), name) is marker
    assert parse_settings([f"{name}={as_text(default)}"], QVPOHyperparameters) == {name: default}


def test_training_shows_no_option_that_does_not_exist() -> None:
    shown = set(inspect.signature(QVPOConfig.training).parameters)
    assert shown == {"self", "replay_in_checkpoints", *options_of(QVPOHyperparameters)}


def test_misspelt_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"'k_behaviour'.*Did you mean 'k_behavior'"):
        QVPOConfig().training(k_behaviour=4)
    with pytest.raises(ValueError, match=r"'k_behaviour'.*Did you mean 'k_behavior'"):
        parse_settings(["k_behaviour=4"], QVPOHyperparameters)


@pytest.mark.parametrize(
    ("name", "instead"),
    [("lr", "actor_lr"), ("train_batch_size", "batch_size"), ("model", "hidden")],
)
def test_options_of_rllib_that_qvpo_replaces_are_refused(name: str, instead: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{instead}"):
        QVPOConfig().training(**{name: 1})


@pytest.mark.parametrize(("name", "instead"), [("lr", "actor_lr"), ("train_batch_size", "batch")])
def test_replaced_options_are_refused_in_a_param_space_too(name: str, instead: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{instead}"):
        QVPOConfig().update_from_dict({name: 1})


def test_misspelt_key_of_a_param_space_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'k_behaviour'.*Did you mean 'k_behavior'"):
        QVPOConfig().update_from_dict({"env": ENV, "k_behaviour": 4})
    with pytest.raises(ValueError, match="'k_behaviour'"):
        QVPO(config={"env": ENV, "k_behaviour": 4})


def test_known_keys_of_a_param_space_are_taken() -> None:
    config = QVPOConfig().update_from_dict({"env": ENV, "k_behavior": 7, "num_env_runners": 3})
    assert (config.env, config.k_behavior, config.num_env_runners) == (ENV, 7, 3)


# --- results -----------------------------------------------------------------------------------


def test_result_has_rllibs_usual_keys(trained: Any) -> None:
    algorithm, result = trained
    assert result["num_env_steps_sampled_lifetime"] == 120 == algorithm.ledger.ingested
    assert result["training_iteration"] == 2
    returns = result["env_runners"]["hist_stats"]["episode_reward"]
    assert result["env_runners"]["episode_return_mean"] == pytest.approx(np.mean(returns))
    assert result["env_runners"]["episode_len_mean"] > 0
    assert result["ledger"] == LEDGER | {"ingested": 120, "done": 80}
    assert set(result["faults"].values()) == {0}
    assert result["replay_size"] == 120


def test_learner_statistics_are_finite(trained: Any) -> None:
    statistics = trained[1]["info"]["learner"]["default_policy"]["learner_stats"]
    expected = {"critic_loss", "actor_loss", "q_mean", "actor_grad_norm", "entropy_weight"}
    assert expected <= set(statistics)
    assert all(isinstance(v, float) and np.isfinite(v) for v in statistics.values())


def test_evaluation_has_exactly_the_episodes_asked_for(trained: Any) -> None:
    episodes = trained[1]["evaluation"]["env_runners"]
    returns = episodes["hist_stats"]["episode_reward"]
    assert len(returns) == EVALUATION_EPISODES
    assert episodes["episode_return_mean"] == pytest.approx(np.mean(returns))


def test_evaluation_says_what_the_critics_predicted_and_what_came(trained: Any) -> None:
    columns = evaluation_columns(trained[1]["evaluation"]["env_runners"])
    bias = columns["evaluation/q_predicted"] - columns["evaluation/q_observed"]
    assert columns["evaluation/q_overestimation"] == pytest.approx(bias)
    # An InvertedPendulum step is worth 1, the one in which it falls nothing.
    assert 0 < columns["evaluation/q_observed"] <= columns["evaluation/return_mean"]


def test_callbacks_are_called_and_their_metrics_reported(trained: Any) -> None:
    _, result = trained
    custom = result["env_runners"]["custom_metrics"]
    assert custom["steps_mean"] == pytest.approx(result["env_runners"]["episode_len_mean"])
    assert custom["reward_mean"] == pytest.approx(result["env_runners"]["episode_return_mean"])
    assert Callbacks.fragments == 120
    assert result["seen_by_callback"] == 2
    assert Callbacks.evaluations
    evaluated = Callbacks.evaluations[-1]
    evaluated = evaluated.get("evaluation", evaluated)
    assert evaluated["env_runners"]["num_episodes"] == EVALUATION_EPISODES


# --- acting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("explore", "k"), [(True, 2), (False, 5)])
def test_compute_single_action_draws_k_actions(
    trained: Any, chosen_k: list[int], explore: bool, k: int
) -> None:
    action = trained[0].compute_single_action(OBS, explore=explore)
    assert chosen_k == [k]
    assert action.shape == (1,)
    assert trained[0].env_runner.envs[0].action_space.contains(np.asarray(action, np.float32))


def test_compute_single_action_scales_to_the_environments_box(trained: Any) -> None:
    algorithm = trained[0]
    state = algorithm.policy.generator.get_state()
    action = algorithm.compute_single_action(OBS, explore=False)
    algorithm.policy.generator.set_state(state)
    np.testing.assert_allclose(action, 3.0 * algorithm.policy.act(OBS[None], k=5)[0], rtol=1e-6)


def test_compute_actions_of_many_observations(trained: Any, chosen_k: list[int]) -> None:
    observations = np.tile(OBS, (6, 1))
    actions, state, extra = trained[0].policy.compute_actions(observations, explore=False)
    assert chosen_k == [5]
    assert (actions.shape, state, extra) == ((6, 1), [], {})
    assert (np.abs(actions) <= 1).all()
    with pytest.raises(ValueError, match="k=0 is not allowed: it must be 1 or more"):
        trained[0].policy.act(observations, k=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_workers_draw_the_k_of_the_evaluation_config(
    build: Any, tiny_config: Any, num_workers: int
) -> None:
    config = tiny_config(ENV)
    config.evaluation(
        evaluation_interval=1,
        evaluation_num_env_runners=num_workers,
        evaluation_duration=EVALUATION_EPISODES,
        evaluation_config={"explore": False, "num_envs_per_env_runner": 2, "k_eval": 9},
    )
    algorithm = build(config)
    episodes = algorithm.evaluate()["env_runners"]
    assert len(episodes["hist_stats"]["episode_reward"]) == EVALUATION_EPISODES
    group = algorithm.eval_env_runner_group
    found = group.foreach_env_runner(
        lambda worker: worker.policy.hp.k_eval, local_env_runner=num_workers == 0
    )
    assert found == [9]
    assert algorithm.policy.hp.k_eval == 4


# --- checkpoints -------------------------------------------------------------------------------


def assert_same_weights(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def assert_acts_alike(found: QVPOTorchPolicy, expected: QVPOTorchPolicy) -> None:
    assert_same_weights(found.get_weights(), expected.get_weights())
    observations = np.random.default_rng(0).normal(size=(8, 4))
    actions = [
        policy.act(observations, k=3, generator=torch.Generator().manual_seed(5))
        for policy in (found, expected)
    ]
    np.testing.assert_array_equal(*actions)


def test_policy_from_checkpoint_alone(trained: Any, saved: Path) -> None:
    policy = Policy.from_checkpoint(str(saved / "policies" / "default_policy"))
    assert isinstance(policy, QVPOTorchPolicy)
    assert_acts_alike(policy, trained[0].policy)


@pytest.mark.parametrize("algorithm_class", [QVPO, Algorithm])
def test_algorithm_from_checkpoint(trained: Any, saved: Path, algorithm_class: Any) -> None:
    algorithm, _ = trained
    restored = algorithm_class.from_checkpoint(str(saved))
    try:
        assert type(restored) is QVPO
        assert restored.iteration == algorithm.iteration
        assert restored.ledger.done == algorithm.ledger.done == restored.learner.num_updates
        assert restored.ledger.ingested == algorithm.ledger.ingested
        assert_acts_alike(restored.policy, algorithm.policy)
        # RLlib's own cannot know of the replay.
        assert len(restored.replay) == (120 if algorithm_class is QVPO else 0)
    finally:
        restored.stop()


# --- Tune --------------------------------------------------------------------------------------


def test_registered_with_tune() -> None:
    assert get_trainable_cls("QVPO") is QVPO


def test_tuner_runs_trials_by_the_registered_name(
    ray_session: None, tiny_config: Any, tmp_path: Path
) -> None:
    """By the class: what `qvpo tune` does, in tests/test_tune_run.py."""
    config = tiny_config(ENV, k_behavior=tune.grid_search([1, 3]), warmup_steps=20)
    results = tune.Tuner(
        "QVPO",
        param_space=config,
        run_config=tune.RunConfig(
            storage_path=str(tmp_path), stop={"training_iteration": 1}, verbose=0
        ),
    ).fit()
    assert not results.errors
    assert sorted(result.config["k_behavior"] for result in results) == [1, 3]
    for result in results:
        assert result.metrics["ledger"] == LEDGER | {"ingested": 60, "done": 40}
