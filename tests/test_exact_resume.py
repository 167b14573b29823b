"""A run that goes on from a checkpoint is, to the last bit, the run that was never interrupted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch

TASKS = ["Hopper-v5", "Walker2d-v5", "Ant-v5", "HalfCheetah-v5", "Humanoid-v5"]
ITERATIONS = 2  # before the checkpoint, and after it


def config_of(tiny_config: Any, env: str, num_env_runners: int) -> Any:
    config = tiny_config(env, update_ratio=0.25, warmup_steps=50)
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
    ("env", "num_env_runners"), [*((task, 0) for task in TASKS), ("Hopper-v5", 2), ("Ant-v5", 2)]
)
def test_a_resumed_run_is_the_uninterrupted_one(
    build: Any, tiny_config: Any, tmp_path: Path, env: str, num_env_runners: int
) -> None:
    config = config_of(tiny_config, env, num_env_runners)
    original = build(config)
    for _ in range(ITERATIONS):
        original.train()
    original.training_step()  # in mid-iteration, episodes in mid-air
    original.save(str(tmp_path))
    expected = identity_of(original, [original.train() for _ in range(ITERATIONS)])
    assert (original.replay.columns.terminal[:300] == 1).any() or env == "HalfCheetah-v5"

    resumed = build(config.copy(copy_frozen=False))
    np.random.rand(5)  # noqa: NPY002
    resumed.restore(str(tmp_path))
    assert_identical(identity_of(resumed, [resumed.train() for _ in range(ITERATIONS)]), expected)
