"""Going on from a checkpoint with other streams, devices and settings; failures that say why."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import reference
import torch
from ray.rllib.callbacks.callbacks import RLlibCallback

from qvpo_rllib.core.replay import UpdateLedger
from qvpo_rllib.core.seeding import restore_generator
from qvpo_rllib.runtime.ray_private import check_resources
from qvpo_rllib.training.plan import gpus_here
from qvpo_rllib.training.run import _interrupts

ENV = "InvertedPendulum-v5"


def evaluating(config: Any) -> Any:
    return config.evaluation(evaluation_interval=10**9, evaluation_duration=3)


def test_going_on_with_another_seed_collects_other_episodes(
    build: Any, tiny_config: Any, tmp_path: Path
) -> None:
    config = tiny_config(ENV, warmup_steps=500).debugging(seed=0)
    original = build(config)
    original.train()
    original.save(str(tmp_path))
    restored = build(config.copy(copy_frozen=False).debugging(seed=1))
    restored.restore(str(tmp_path))
    restored.train()
    columns = reference.in_order(restored.replay)
    first, second = columns.obs[:60], columns.obs[60:120]
    assert not torch.equal(first[0], second[0])  # the first state after a reset
    assert not torch.equal(columns.action[:60], columns.action[60:120])


def test_restore_takes_what_save_returned_and_a_relative_path(
    build: Any, tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    algorithm = build(tiny_config(ENV).debugging(seed=0))
    algorithm.train()
    saved = algorithm.save("here")
    for source in (saved, saved.checkpoint, "here"):
        restored = build(tiny_config(ENV).debugging(seed=0))
        restored.restore(source)
        assert restored.ledger == algorithm.ledger


@pytest.mark.parametrize(("capacity", "kept"), [(50, 50), (100, 60), (2000, 60)])
def test_another_replay_capacity_keeps_the_newest(
    build: Any, tiny_config: Any, tmp_path: Path, capacity: int, kept: int
) -> None:
    algorithm = build(tiny_config(ENV, replay_capacity=2000))
    algorithm.train()
    algorithm.save(str(tmp_path))
    expected = reference.in_order(algorithm.replay).reward[-kept:]
    restored = build(tiny_config(ENV, replay_capacity=capacity, warmup_steps=40))
    restored.restore(str(tmp_path))
    assert torch.equal(reference.in_order(restored.replay).reward, expected)
    restored.train()
    assert len(restored.replay) == min(capacity, 120)


def test_a_higher_update_ratio_owes_nothing_for_the_past(
    build: Any, tiny_config: Any, tmp_path: Path
) -> None:
    algorithm = build(tiny_config(ENV))
    algorithm.train()
    done = algorithm.ledger.done
    algorithm.save(str(tmp_path))
    restored = build(tiny_config(ENV, update_ratio=4.0))
    restored.restore(str(tmp_path))
    assert restored.ledger.owed == 0
    restored.train()
    assert restored.ledger.done == done + 4 * 60


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("done", [0, 7, 100])
def test_settling_a_ledger(ratio: float, done: int) -> None:
    for refill in (False, True):
        ledger = UpdateLedger(ratio, 50, ingested=400, done=done)
        ledger.rebase(refill=refill)
        assert ledger.owed == 0
        ledger.ingested += 50 * refill
        assert ledger.owed == 0
        ledger.ingested += 20
        assert abs(ledger.owed - 20 * ratio) <= 1 + ratio


@pytest.mark.parametrize(("ratio", "warmup"), [(0.5, 1000), (1.0, 2000), (2.0, 300)])
def test_a_change_in_the_warm_up_does_not_end_it(ratio: float, warmup: int) -> None:
    """After 500 env steps of a warm-up of 1000 at a ratio of 1."""
    ledger = UpdateLedger(ratio, warmup, ingested=500)
    ledger.rebase(refill=False)
    assert ledger.owed == 0
    assert ledger.warming_up == (warmup > 500)
    ledger.ingested = max(warmup, 500)
    assert ledger.owed == 0
    assert not ledger.warming_up
    ledger.ingested += 20
    assert ledger.owed == 20 * ratio


def test_a_generator_state_of_another_device_seeds_instead() -> None:
    cuda_like = torch.arange(16, dtype=torch.uint8)
    first, second = torch.Generator(), torch.Generator()
    restore_generator(first, cuda_like)
    restore_generator(second, cuda_like)
    assert torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=second))
    restore_generator(second, cuda_like + 1)
    assert not torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=second))


def test_a_changed_configuration_starts_afresh_in_the_same_process(
    build: Any, tiny_config: Any, tmp_path: Path
) -> None:
    """As Tune does with `reuse_actors`: for another trial, and for a population's copy."""
    config = tiny_config(ENV).debugging(seed=0)
    algorithm, expected = build(config), build(tiny_config(ENV).debugging(seed=5))
    algorithm.train()
    algorithm.save(str(tmp_path))
    options = {**config.to_dict(), "seed": 5}
    assert algorithm.reset(dict(options))
    assert algorithm.ledger.ingested == len(algorithm.replay) == algorithm.iteration == 0
    result = [a.train() for a in (algorithm, expected)]
    assert result[0]["num_env_steps_sampled_lifetime"] == 60
    for name, value in expected.policy.get_weights().items():
        assert np.array_equal(algorithm.policy.get_weights()[name], value), name

    changed = {"actor_lr": 0.02, "critic_lr": 0.03, "k_behavior": 2, "entropy_weight": 0.5}
    assert algorithm.reset({**options, **changed})
    algorithm.restore(str(tmp_path))
    assert algorithm.ledger.ingested == algorithm.learner.env_steps == 60
    assert algorithm.policy.hp.k_behavior == algorithm.env_runner.policy.hp.k_behavior == 2
    assert float(algorithm.learner.entropy_weight) == 0.5
    rates = [
        group["lr"]
        for optimizer in (algorithm.learner.actor_optimizer, algorithm.learner.critic_optimizer)
        for group in optimizer.param_groups
    ]
    assert rates == [0.02, 0.03]
    assert algorithm.train()["num_env_steps_sampled_lifetime"] == 120


def test_evaluating_without_environments_of_its_own_is_refused(
    build: Any, tiny_config: Any
) -> None:
    algorithm = build(tiny_config(ENV).evaluation(evaluation_interval=None))
    with pytest.raises(ValueError, match="evaluation_interval"):
        algorithm.evaluate()


def test_evaluation_leaves_training_as_it_was(build: Any, tiny_config: Any) -> None:
    def weights(evaluations: int) -> dict[str, np.ndarray]:
        algorithm = build(evaluating(tiny_config(ENV).debugging(seed=3)))
        algorithm.train()
        for _ in range(evaluations):
            algorithm.evaluate()
        algorithm.train()
        return algorithm.policy.get_weights()

    with_it, without = weights(2), weights(0)
    assert all(np.array_equal(with_it[name], without[name]) for name in without)


def test_missing_evaluation_episodes_are_an_error(
    build: Any, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = build(evaluating(tiny_config(ENV)))
    worker = algorithm.eval_env_runner
    monkeypatch.setattr(worker, "evaluate_episodes", lambda *_: [])
    with pytest.raises(RuntimeError, match="Only 0 of 3 evaluation episodes"):
        algorithm.evaluate()


class CountSteps(RLlibCallback):
    """Puts the number of steps on every episode."""

    def on_episode_start(self, *, episode: Any, **kwargs: Any) -> None:
        episode.hist_data["steps"] = []

    def on_episode_step(self, *, episode: Any, **kwargs: Any) -> None:
        episode.hist_data["steps"].append(1)

    def on_episode_end(self, *, episode: Any, **kwargs: Any) -> None:
        episode.custom_metrics["steps"] = len(episode.hist_data["steps"])


def test_episode_callbacks_are_called_in_evaluation_too(build: Any, tiny_config: Any) -> None:
    algorithm = build(evaluating(tiny_config(ENV).callbacks(CountSteps)))
    results = algorithm.evaluate()["env_runners"]
    assert results["custom_metrics"]["steps_mean"] == pytest.approx(results["episode_len_mean"])
    assert len(results["hist_stats"]["steps"]) == sum(results["hist_stats"]["episode_lengths"])


def test_an_environments_own_error_reaches_the_user(build: Any, tiny_config: Any) -> None:
    algorithm = build(tiny_config("environments:Raising-v0"))
    with pytest.raises(RuntimeError, match="the motor is on fire"):
        algorithm.train()


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("env_runners", {"observation_filter": "MeanStdFilter"}),
        ("env_runners", {"batch_mode": "complete_episodes"}),
        ("environment", {"normalize_actions": False}),
        ("learners", {"num_learners": 1}),
    ],
)
def test_settings_that_nothing_reads_are_refused(
    tiny_config: Any, method: str, setting: dict[str, Any]
) -> None:
    config = getattr(tiny_config(ENV), method)(**setting)
    with pytest.raises(ValueError, match=next(iter(setting))):
        config.validate()


def test_a_second_signal_ends_at_once_and_the_first_lets_a_step_finish() -> None:
    class Algorithm:
        stop_requested = False

    algorithm = Algorithm()
    before = signal.getsignal(signal.SIGINT)
    with _interrupts(algorithm):
        signal.raise_signal(signal.SIGINT)
        assert algorithm.stop_requested
        with pytest.raises(SystemExit) as exit_info:
            signal.raise_signal(signal.SIGINT)
    assert exit_info.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_the_environments_arguments_are_in_the_checkpoint(
    build: Any, tiny_config: Any, tmp_path: Path
) -> None:
    config = tiny_config(ENV).environment(env_config={"reset_noise_scale": 0.02})
    build(config).save(str(tmp_path))
    stored = json.loads((tmp_path / "qvpo.json").read_text())
    assert stored["env_config"] == {"reset_noise_scale": 0.02}


def test_a_checkpoint_of_a_gpu_goes_on_on_the_cpu(
    build: Any, tiny_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    original = build(tiny_config(ENV))
    original.config = original.config.copy(copy_frozen=False).resources(num_gpus=1)
    original.save(str(tmp_path))
    restored = type(original).from_checkpoint(str(tmp_path))
    restored.stop()
    assert restored.config.num_gpus == 0
    assert "goes on on the CPU" in caplog.text
    assert gpus_here(1.0, None) == gpus_here(1.0, 0.0) == 0.0


def test_more_workers_than_the_cluster_can_hold_are_refused(build: Any, tiny_config: Any) -> None:
    config = tiny_config(ENV).env_runners(num_env_runners=4, num_cpus_per_env_runner=2)
    with pytest.raises(ValueError, match=r"8 CPU are needed, of 4\. Lower num_env_runners"):
        build(config)
    config = tiny_config(ENV).env_runners(num_env_runners=1, num_gpus_per_env_runner=1)
    with pytest.raises(ValueError, match="1 GPU are needed, of 0"):
        build(config)


def nodes_of(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> None:
    """Lets Ray tell of a cluster of these nodes, and of one that has died."""
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, dead])
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)


def test_a_worker_that_fits_no_node_is_refused(
    build: Any, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes_of(monkeypatch, {"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 4.0})
    config = tiny_config(ENV).env_runners(num_env_runners=1, num_cpus_per_env_runner=5)
    text = "needs 5 CPU on one node, and the nodes have 4 CPU; 2 CPU. Lower num_env_runners"
    with pytest.raises(ValueError, match=text):
        build(config)
    both = {"CPU": 4, "GPU": 1}
    with pytest.raises(ValueError, match="4 CPU and 1 GPU on one node, and the nodes have 4 CPU"):
        check_resources([both], "")
    check_resources([{"CPU": 4, "GPU": 0}, {"CPU": 2, "GPU": 1}, *[{"CPU": 0.1}] * 40], "")
    with pytest.raises(ValueError, match=r"10\.1 CPU are needed, of 10"):
        check_resources([{"CPU": 0.1}] * 101, "")


def test_a_seed_repeats_a_single_action(build: Any, tiny_config: Any) -> None:
    algorithm, obs = build(tiny_config(ENV)), np.zeros(4, np.float32)
    before = algorithm.policy.generator.get_state()
    first, second = (algorithm.compute_single_action(obs, explore=False, seed=3) for _ in range(2))
    assert first == second
    assert torch.equal(algorithm.policy.generator.get_state(), before)
    assert first != algorithm.compute_single_action(obs, explore=False, seed=4)
