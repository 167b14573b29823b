"""TD3, DIPO and QSM on RLlib: options, acting, remote workers, checkpoints."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.tune.registry import get_trainable_cls
from test_exact_resume import assert_identical, identity_of

from qvpo_rllib.algorithms import dipo, qsm, td3
from qvpo_rllib.checkpoints import metadata as checkpoint
from qvpo_rllib.core.options import options_of, parse_option
from qvpo_rllib.core.replay import ReplayBuffer, Transitions

ENV = "InvertedPendulum-v5"
TASKS = ["Hopper-v5", "Walker2d-v4", "Ant-v5", "HalfCheetah-v5", "Humanoid-v5", "Pendulum-v1"]
RIVALS = {
    "TD3": (td3.TD3Config, td3.TD3, {}),
    "DIPO": (dipo.DIPOConfig, dipo.DIPO, {"diffusion_steps": 3, "action_steps": 2}),
    "QSM": (qsm.QSMConfig, qsm.QSM, {"diffusion_steps": 3}),
}
TINY = {"hidden": (16,), "batch_size": 16, "warmup_steps": 40, "replay_capacity": 150,
        "engine": "eager"}  # fmt: skip
rivals = pytest.mark.parametrize("name", RIVALS)


def config_of(name: str, num_workers: int = 0, **options: Any) -> Any:
    config_class, _, own = RIVALS[name]
    config = config_class().environment(ENV).training(**{**TINY, **own, **options})
    config.env_runners(num_env_runners=num_workers, num_envs_per_env_runner=2)
    config.reporting(min_sample_timesteps_per_iteration=60)
    config.evaluation(evaluation_interval=None, evaluation_duration=2)
    return config.debugging(seed=0, log_level="ERROR")


# --- Options ---------------------------------------------------------------------------------


@rivals
def test_defaults_live_in_the_dataclass_alone(name: str) -> None:
    config_class, algorithm_class, _ = RIVALS[name]
    kind = config_class.hyperparameters_class
    shown = inspect.signature(config_class.training).parameters
    assert set(shown) == {"self", "replay_in_checkpoints", *options_of(kind)}
    for option, default in kind().to_dict().items():
        assert shown[option].default == default
        assert getattr(config_class(), option) == default
        text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert parse_option(option, text, kind) == default
    assert type(algorithm_class.get_default_config()) is config_class
    assert get_trainable_cls(name) is algorithm_class


@rivals
def test_misspelt_and_replaced_options_are_refused(name: str) -> None:
    config_class = RIVALS[name][0]
    with pytest.raises(ValueError, match=r"'actor_Ir'.*Did you mean 'actor_lr'"):
        config_class().training(actor_Ir=1)
    with pytest.raises(ValueError, match=f"{name} does not read 'lr': use actor_lr"):
        config_class().training(lr=1)
    with pytest.raises(ValueError, match="engine='cuda_graph' does not exist"):
        config_class().environment(ENV).training(engine="cuda_graph").validate()


@rivals
@pytest.mark.parametrize("task", TASKS)
def test_every_preset_builds_for_every_task(name: str, task: str) -> None:
    config_class = RIVALS[name][0]
    presets = config_class.hyperparameters_class.presets
    assert {"default", "light", "quick"} <= set(presets)
    for values in presets.values():
        hp = config_class().environment(task).training(**values).hyperparameters()
        assert {option: getattr(hp, option) for option in values} == values


def test_dipos_options_follow_the_task() -> None:
    def values(task: str) -> tuple[Any, ...]:
        hp = dipo.DIPOConfig().environment(task).hyperparameters()
        return hp.grad_clip, hp.action_clip_ratio, hp.action_steps, hp.target_actor_interval

    assert values("Hopper-v5") == (1.0, 0.3, 20, 1)
    assert values("Walker2d-v5") == (2.0, 0.08, 20, 1)
    assert values("Ant-v4") == (0.8, 0.1, 20, 1)
    assert values("HalfCheetah-v5") == (2.0, 0.08, 40, 2)
    assert values("Humanoid-v5") == (2.0, 0.1, 20, 1)


# --- The second copy of the actions ----------------------------------------------------------


def transitions(first: int, last: int) -> Transitions:
    rows = torch.arange(first, last, dtype=torch.float32)[:, None]
    return Transitions(rows, rows, rows[:, 0], rows, rows[:, 0])


def test_improved_actions_go_with_their_rows_into_a_ring_of_any_size() -> None:
    replay = ReplayBuffer(10, 1, 1, seed=0, device="cpu", improves_actions=True)
    replay.add(transitions(0, 13))
    assert replay.improved_actions()[:, 0].tolist() == list(range(3, 13))
    assert replay.improved_action is not None
    replay.improved_action.add_(100)
    replay.add(transitions(13, 15))
    expected = [*range(105, 113), 13, 14]
    assert replay.improved_actions()[:, 0].tolist() == expected
    for capacity in (10, 4, 20):
        other = ReplayBuffer(capacity, 1, 1, seed=0, device="cpu", improves_actions=True)
        other.load(replay.state_dict(), replay.segments())
        other.set_improved_actions(replay.improved_actions())
        assert other.improved_actions()[:, 0].tolist() == expected[-capacity:]
        held = torch.cat([part.action for part in other.segments()])
        assert torch.equal(other.improved_actions() % 100, held)


# --- Runs ------------------------------------------------------------------------------------


@rivals
def test_acting_explores_in_training_alone(build: Any, name: str) -> None:
    policy = build(config_of(name)).policy
    obs = np.random.default_rng(0).normal(size=(50, 4))

    def act(explore: bool, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return policy.act(obs, explore=explore, generator=generator)

    explored, evaluated = act(True, 0), act(False, 0)
    assert explored.shape == (50, 1)
    assert explored.dtype == np.float32
    assert np.abs(explored).max() <= 1
    np.testing.assert_array_equal(explored, act(True, 0))
    assert not np.array_equal(explored, act(True, 1))
    assert not np.array_equal(explored, evaluated)
    if name == "TD3":
        np.testing.assert_array_equal(evaluated, act(False, 1))
        inside = np.abs(explored) < 1
        assert (explored - evaluated)[inside].std() == pytest.approx(0.1, rel=0.3)
    actions, _, _ = policy.compute_actions(obs, explore=False)
    assert actions.shape == (50, 1)
    with pytest.raises(ValueError, match=f"k=2 is not allowed: {name}.* takes one action in each"):
        policy.act(obs, k=2)


@pytest.mark.parametrize("name", ["DIPO", pytest.param("QSM", marks=pytest.mark.slow)])
def test_a_resumed_run_with_remote_workers_is_the_uninterrupted_one(
    build: Any, tmp_path: Path, name: str
) -> None:
    config = config_of(name, num_workers=1, sampling_mode="sync", update_ratio=0.5)
    original = build(config)
    for _ in range(3):
        original.train()
    original.training_step()  # in mid-iteration, episodes in mid-air
    original.save(str(tmp_path))
    expected = run_identity(original)
    assert original.ledger.ingested > TINY["replay_capacity"]  # the ring has wrapped

    resumed = build(config.copy(copy_frozen=False))
    resumed.restore(str(tmp_path))
    assert_identical(run_identity(resumed), expected)
    metadata = checkpoint.Metadata.read(tmp_path)
    assert metadata.algorithm == name
    assert (checkpoint.IMPROVED_ACTIONS_FILE in metadata.files) == (name == "DIPO")
    checkpoint.drop_replay(tmp_path)
    checkpoint.Metadata.read(tmp_path).check_files(tmp_path)
    assert not (tmp_path / checkpoint.IMPROVED_ACTIONS_FILE).exists()


def run_identity(algorithm: Any) -> dict[str, Any]:
    identity = identity_of(algorithm, [algorithm.train()])
    if algorithm.replay.improved_action is not None:
        identity["improved"] = algorithm.replay.improved_actions()
        original = torch.cat([part.action for part in algorithm.replay.segments()])
        assert not torch.equal(identity["improved"], original)
    return identity


def test_a_checkpoint_of_another_algorithm_is_refused(build: Any, tmp_path: Path) -> None:
    algorithm = build(config_of("DIPO"))
    algorithm.save(str(tmp_path))
    kind = algorithm.config.hyperparameters_class
    other = replace(algorithm.metadata(), algorithm="QSM")
    with pytest.raises(ValueError, match=r"algorithm='DIPO'.*this run has algorithm='QSM'"):
        checkpoint.Metadata.read(tmp_path).check_fits(other, tmp_path, kind)
    hyperparameters = {**other.hyperparameters, "diffusion_steps": 9}
    deeper = replace(algorithm.metadata(), hyperparameters=hyperparameters)
    with pytest.raises(ValueError, match="diffusion_steps"):
        checkpoint.Metadata.read(tmp_path).check_fits(deeper, tmp_path, kind)


@pytest.mark.parametrize("name", ["TD3", pytest.param("QSM", marks=pytest.mark.slow)])
def test_asynchronous_workers_and_evaluation(build: Any, name: str) -> None:
    config = config_of(name, num_workers=1, sampling_mode="async")
    config.evaluation(evaluation_interval=1, evaluation_duration=2)
    algorithm = build(config)
    result = algorithm.train()
    ledger = algorithm.ledger
    assert ledger.done == ledger.ingested - TINY["warmup_steps"] == algorithm.learner.num_updates
    stats = result["info"]["learner"]["default_policy"]["learner_stats"]
    assert {"critic_loss", "actor_loss", "q_mean", "td_target_mean"} <= set(stats)
    assert all(np.isfinite(value) for value in stats.values())
    assert len(result["evaluation"]["env_runners"]["hist_stats"]["episode_reward"]) == 2
