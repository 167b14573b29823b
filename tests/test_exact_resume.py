"""A run that goes on from a checkpoint is, to the last bit, the run that was never interrupted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch

TASKS = ["Hopper-v5", "Walker2d-v5", "Ant-v5", "HalfCheetah-v5", "Humanoid-v5"]
ITERATIONS = 2  # before the checkpoint, and after it


# Options with more state than the default: other critics, and numbers that updates learn.
MORE_STATE = {
    "critics": {"critic": "quantile", "critic_layer_norm": True},
    "softmax": {"q_weights": "softmax", "kl_target": 0.5, "entropy_weight": "auto"},
    "guidance": {"target_refinement": "guidance", "entropy_in_target": "auto"},
}


def config_of(tiny_config: Any, env: str, num_env_runners: int, options: Any = None) -> Any:
    steady = {"update_ratio": 0.25, "warmup_steps": 50, "sampling_mode": "sync"}
    config = tiny_config(env, **steady, **(options or {}))
    config.env_runners(num_env_runners=num_env_runners, num_envs_per_env_runner=2)
    return config.debugging(seed=4)


def identity_of(algorithm: Any, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that a run is, by name."""
    replay = reference.in_order(algorithm.replay)._asdict()
    learner = flat(algorithm.learner.state_dict(), "learner")
    stats = [r["info"]["learner"]["default_policy"]["learner_stats"] for r in results]
    return {
        **{f"replay/{name}": column.clone() for name, column in replay.items()},
        **learner,
        **flat(algorithm.replay.state_dict(), "replay_state"),
        "ledger": algorithm.ledger.state_dict(),
        "num_grad_updates": algorithm.policy.get_state()["num_grad_updates"],
        "metrics": stats,
        "returns": [r["env_runners"]["hist_stats"]["episode_reward"] for r in results],
        "lengths": [r["env_runners"]["hist_stats"]["episode_lengths"] for r in results],
        "means": [r["env_runners"]["episode_return_mean"] for r in results],
    }


def flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {n: v for key, item in value.items() for n, v in flat(item, f"{name}/{key}").items()}
    return {name: value.clone() if isinstance(value, torch.Tensor) else value}


def assert_identical(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            np.testing.assert_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("env", "num_env_runners", "options"),
    [
        *((task, 0, None) for task in TASKS),
        ("Ant-v5", 2, None),
        *(("Hopper-v5", 0, name) for name in MORE_STATE),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    build: Any, tiny_config: Any, tmp_path: Path, env: str, num_env_runners: int, options: str
) -> None:
    config = config_of(tiny_config, env, num_env_runners, MORE_STATE.get(options))
    original = build(config)
    for _ in range(ITERATIONS):
        original.train()
    original.training_step()  # in mid-iteration, episodes in mid-air
    original.save(str(tmp_path))
    expected = identity_of(original, [original.train() for _ in range(ITERATIONS)])
    # A cheetah's episode never ends so; whether an ant's has depends on the CPU's rounding.
    ended = (original.replay.columns.terminal[:300] == 1).any()
    assert ended or env in ("HalfCheetah-v5", "Ant-v5")

    resumed = build(config.copy(copy_frozen=False))
    np.random.rand(5)  # noqa: NPY002
    resumed.restore(str(tmp_path))
    assert_identical(identity_of(resumed, [resumed.train() for _ in range(ITERATIONS)]), expected)


def test_what_cannot_be_captured_starts_a_new_episode_and_a_warning_says_so(
    build: Any, tiny_config: Any, tmp_path: Path, caplog: Any
) -> None:
    """Episodes of 50 steps, observed as (episode, step); the checkpoint is after 60 steps."""
    config = tiny_config("environments:Elsewhere-v0", warmup_steps=500)
    original = build(config)
    original.train()
    for directory in ("1", "2"):
        original.save(str(tmp_path / directory))
    assert [r.name for r in caplog.records].count(
        "qvpo_rllib.checkpoints.run_state"
    ) == 1  # not every time
    assert "state is in another process" in caplog.text
    caplog.clear()
    resumed = build(config.copy(copy_frozen=False))
    resumed.restore(str(tmp_path / "2"))
    assert "1 environments or workers start new episodes" in caplog.text
    resumed.train()
    steps = reference.in_order(resumed.replay).obs[:, 1].tolist()
    assert steps == [*range(50), *range(10), *range(50), *range(10)]
    assert resumed.ledger.ingested == 120


def test_more_environments_or_workers_than_before_go_on_as_far_as_they_can(
    build: Any, tiny_config: Any, tmp_path: Path, caplog: Any
) -> None:
    config = tiny_config(warmup_steps=500, sampling_mode="sync").env_runners(num_env_runners=1)
    original = build(config)
    original.train()
    original.save(str(tmp_path))
    more = config.copy(copy_frozen=False).env_runners(num_env_runners=2)
    resumed = build(more)
    resumed.restore(str(tmp_path))
    assert "Worker 2 is new" in caplog.text
    original.train()
    resumed.train()
    expected = reference.in_order(original.replay).obs[60:90]
    found = reference.in_order(resumed.replay).obs[60:]
    assert torch.equal(found[0::2], expected)  # the first worker goes on
    assert not torch.equal(found[1::2], expected)
