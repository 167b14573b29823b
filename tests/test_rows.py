"""A metrics row has the same columns for a run and for a trial, whatever the algorithm."""

import json
from typing import Any

import numpy as np

from qvpo_rllib.training.rows import metrics_row, points


def result(num_env_runners: int, **more: Any) -> dict[str, Any]:
    """What an algorithm's `train()` returns, as far as a row is made of it."""
    return {
        "config": {"num_env_runners": num_env_runners},
        "ledger": {"ingested": 20, "done": 7, "owed": 0.5, "staleness_mean": 1.5},
        "time_total_s": 3.0,
        "env_runners": {"episode_return_mean": float("nan"), "episode_len_mean": 4.0},
        "num_remote_worker_restarts": 2,
        **more,
    }


def test_a_row_before_the_first_update_has_what_every_row_has() -> None:
    assert metrics_row(result(0, faults={"restarts": 1}), time_before_s=2.0) == {
        "env_steps": 20,
        "updates": 7,
        "time_total_s": 5.0,
        "episode_return_mean": None,
        "episode_length_mean": 4.0,
    }


def test_learner_workers_and_evaluation_add_their_columns() -> None:
    stats = {"learner_stats": {"critic_loss": np.float32(0.5), "q_mean": np.inf}}
    episodes = {"hist_stats": {"episode_reward": [1.0, 3.0]}, "episode_len_mean": 9.0}
    row = metrics_row(
        result(
            2,
            faults={"timeouts": 3},
            info={"learner": {"default_policy": stats}},
            evaluation={"env_runners": episodes},
        )
    )
    assert json.loads(json.dumps(row)) == row
    assert (row["learner/critic_loss"], row["learner/q_mean"]) == (0.5, None)
    assert row["sampling/staleness_mean"] == 1.5
    assert row["faults/timeouts"] == 3.0
    assert (row["evaluation/return_mean"], row["evaluation/return_std"]) == (2.0, 1.0)
    rllibs = result(2, faults={"restarts": 2})  # as the algorithms on RLlib's report them
    assert metrics_row(rllibs)["faults/restarts"] == 2.0
    assert points([row, {"env_steps": 30}], "evaluation/return_mean") == [(20, 2.0)]
    assert points([row], "learner/q_mean") == []
