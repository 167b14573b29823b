"""The loop of `qvpo train`: where it stops, where it goes on, and what it calls the best."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.rllib.policy.policy import Policy

from qvpo_rllib.runtime.base import BaseAlgorithm
from qvpo_rllib.training.plan import TrainingPlan, make_plan
from qvpo_rllib.training.run import TrainingRun
from qvpo_rllib.training.run_directory import RunDirectory

SMALL = ["hidden=8", "batch_size=16", "warmup_steps=100", "engine=eager"]


def plan_of(settings: list[str], **options: Any) -> TrainingPlan:
    sizes = {"num_env_runners": 0, "num_envs_per_env_runner": 1, "num_gpus": 0, **options}
    names = {"algo": "td3", "env": "InvertedPendulum-v5", "preset": "quick", "seed": 0}
    return make_plan(settings=settings, **names, **sizes)


def rows_of(path: Path, plan: TrainingPlan, *, stops: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """The rows of a run that is stopped when it has done each of `stops` env steps, and resumed."""
    for part, stop in enumerate((*stops, None)):
        if part == 0:
            directory = RunDirectory.create(path, plan.to_dict(), [])
        else:
            directory = RunDirectory.open(path, [])
        with directory:
            training = TrainingRun(plan, directory, resume=part > 0)
            if stop is None:
                training.run()
            else:
                stop_at(training.algorithm, stop)
                with pytest.raises(KeyboardInterrupt):
                    training.run()
            training.close()
    return [{n: v for n, v in r.items() if n != "time_total_s"} for r in directory.metrics.rows()]


def stop_at(algorithm: BaseAlgorithm, env_steps: int) -> None:
    """As a signal does in the training step that reaches `env_steps`."""
    step = algorithm.training_step

    def stopping_step() -> Any:
        result = step()
        algorithm.stop_requested = algorithm.env_steps >= env_steps
        return result

    algorithm.training_step = stopping_step


def test_a_stop_within_an_iteration_leaves_no_trace(ray_session: None, tmp_path: Path) -> None:
    """An iteration has five env steps; after 997 and 1497 an evaluation is three steps away."""
    plan = plan_of([*SMALL, "update_ratio=0.1"], env_steps=1500, eval_interval=500)
    assert plan.iteration_steps() == 5
    expected = rows_of(tmp_path / "whole", plan)
    assert expected[-1]["env_steps"] == 1500
    assert sum("evaluation/return_mean" in row for row in expected) == 3
    found = rows_of(tmp_path / "cut", plan, stops=(997, 1497))
    assert found == expected
    last = (tmp_path / "cut" / "checkpoints" / "last").resolve()
    assert last.name == "000001500"


def test_the_best_checkpoint_has_the_policy_that_was_evaluated(
    ray_session: None, tmp_path: Path
) -> None:
    """Workers that sample beside the learner have env steps in flight, which owe updates."""
    workers = {"num_env_runners": 2, "num_envs_per_env_runner": 4}
    plan = plan_of(SMALL, env_steps=600, eval_interval=300, **workers)
    weights: dict[int, np.ndarray] = {}
    with RunDirectory.create(tmp_path / "run", plan.to_dict(), []) as directory:
        training = TrainingRun(plan, directory, resume=False)
        evaluate = training.algorithm.evaluate

        def noting_evaluate() -> Any:
            results = evaluate()
            algorithm = training.algorithm
            weights[algorithm.updates] = flat(algorithm.policy.get_weights())
            return results

        training.algorithm.evaluate = noting_evaluate
        training.run()
        training.close()
    best = tmp_path / "run" / "checkpoints" / "best"
    about = json.loads((best / "qvpo.json").read_text())
    policy = Policy.from_checkpoint(str(best))["default_policy"]
    np.testing.assert_array_equal(flat(policy.get_weights()), weights[about["ledger"]["done"]])
    evaluated = [r for r in directory.metrics.rows() if "evaluation/return_mean" in r]
    assert [row["updates"] for row in evaluated] == list(weights)
    assert about["ledger"]["ingested"] in [row["env_steps"] for row in evaluated]


def flat(weights: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([value.ravel() for value in weights.values()])
