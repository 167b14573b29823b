"""`n_step` on RLlib: from environments to targets, and runs that go on to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import reference
import test_exact_resume
import test_rivals_rllib
import torch
from test_exact_resume import assert_identical, identity_of

from qvpo_rllib.checkpoints import metadata as checkpoint

GAMMA, N = 0.5, 3
BOTH = {"n_step": N, "normalize_observations": True}


@pytest.mark.parametrize(("num_workers", "mode"), [(0, "sync"), (2, "async")])
def test_what_an_environment_did_is_summed_to_its_episodes_end(
    build: Any, tiny_config: Any, num_workers: int, mode: str
) -> None:
    """Episodes of 5 steps of reward 1, observed as (episode, step); even ones end by a time limit,
    odd ones by termination."""
    config = tiny_config(
        "environments:Counting-v0", n_step=N, gamma=GAMMA, sampling_mode=mode, warmup_steps=60
    )
    config.env_runners(num_env_runners=num_workers, num_envs_per_env_runner=2)
    algorithm = build(config)
    algorithm.train()
    algorithm.train()
    replay = algorithm.replay
    batch = replay.sample(500, N, GAMMA)
    newest = {tuple(replay.columns.next_obs[number].tolist())
              for _, number, _ in replay.state_dict()["newest"]}  # fmt: skip
    shorter = 0
    for (episode, step), reward, (of, last), terminal in zip(
        batch.obs.tolist(), batch.reward, batch.next_obs.tolist(), batch.terminal, strict=True
    ):
        k = int(last - step)
        assert of == episode
        assert k == N or last == 5 or (of, last) in newest
        shorter += k < N
        assert reward == sum(GAMMA**i for i in range(k))
        ended = last == 5 and episode % 2 == 1
        assert terminal == pytest.approx(1.0 if ended else 1 - GAMMA ** (k - 1))
    assert 0 < shorter < 400
    # The replay itself, which is exported and saved, holds single steps.
    assert (reference.in_order(replay).reward == 1).all()
    assert algorithm.ledger.ingested == replay.num_added


def test_an_environment_that_is_replaced_ends_its_episode(build: Any, tiny_config: Any) -> None:
    config = tiny_config("environments:Raising-v0", n_step=N, warmup_steps=100)
    config.env_runners(num_envs_per_env_runner=2)
    config.fault_tolerance(restart_failed_sub_environments=True)
    algorithm = build(config)
    for _ in range(2):
        algorithm.train()
    batch = algorithm.replay.sample(500, N, 1.0)
    steps = batch.next_obs[:, 1] - batch.obs[:, 1]
    assert torch.equal(batch.next_obs[:, 0], batch.obs[:, 0])
    assert torch.equal(batch.reward, steps)
    assert steps.min() >= 1


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one(
    build: Any, tiny_config: Any, tmp_path: Path, num_workers: int
) -> None:
    config = test_exact_resume.config_of(tiny_config, "Hopper-v5", num_workers).training(**BOTH)
    resumed_as_original(build, config, tmp_path, iterations=2)


@test_rivals_rllib.rivals
def test_a_rivals_resumed_run_is_the_uninterrupted_one(
    build: Any, tmp_path: Path, name: str
) -> None:
    config = test_rivals_rllib.config_of(name, update_ratio=0.5, **BOTH)
    resumed_as_original(build, config, tmp_path, iterations=3)  # the ring of 150 has wrapped
    assert checkpoint.SUCCESSORS_FILE in checkpoint.Metadata.read(tmp_path).files
    checkpoint.drop_replay(tmp_path)
    checkpoint.Metadata.read(tmp_path).check_files(tmp_path)
    assert not (tmp_path / checkpoint.SUCCESSORS_FILE).exists()


def resumed_as_original(build: Any, config: Any, directory: Path, iterations: int) -> None:
    original = build(config)
    for _ in range(iterations):
        original.train()
    original.training_step()  # in mid-iteration, episodes in mid-air
    original.save(str(directory))
    in_the_air = original.replay.state_dict()["newest"]
    assert in_the_air
    expected = whole(original, [original.train() for _ in range(2)])
    resumed = build(config.copy(copy_frozen=False))
    resumed.restore(str(directory))
    assert resumed.replay.state_dict()["newest"] == in_the_air
    assert_identical(whole(resumed, [resumed.train() for _ in range(2)]), expected)


def whole(algorithm: Any, results: list[dict[str, Any]]) -> dict[str, Any]:
    steps = algorithm.replay.steps_to_successors()
    assert 0 < (steps == 0).sum() < len(steps) / 2
    return {**identity_of(algorithm, results), "steps": steps}


def test_a_run_may_go_on_with_another_n(build: Any, tiny_config: Any, tmp_path: Path) -> None:
    original = build(tiny_config(warmup_steps=30))
    original.train()
    original.save(str(tmp_path))
    resumed = build(tiny_config(warmup_steps=30, n_step=N))
    resumed.restore(str(tmp_path))
    resumed.train()
    steps = resumed.replay.steps_to_successors()
    assert (steps[:60] == 0).all()  # what was collected before stands for itself
    assert (steps[60:] == 1).sum() > 30
    resumed.save(str(tmp_path / "again"))
    back = build(tiny_config(warmup_steps=30))
    back.restore(str(tmp_path / "again"))
    back.train()
    assert back.replay.successor is None
