"""Metrics rows: what a run's `metrics.jsonl` and a trial's `results/<trial>.jsonl` hold.

The README's table of metrics says what each column is and in which unit.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Value = float | int | str | None
Row = dict[str, Value]

RETURN = "evaluation/return_mean"


def metrics_row(result: Mapping[str, Any], time_before_s: float = 0.0) -> Row:
    """Returns a result of an algorithm's `train()` as a row, the same for a run and for a trial.

    Columns of the learner are there after the first update, those of sampling and faults with
    remote workers, those of an evaluation if the result has one.

    Args:
        time_before_s: seconds of training before the process that the result is of.
    """
    ledger, training = result["ledger"], result["env_runners"]
    row: dict[str, Any] = {
        "env_steps": ledger["ingested"],
        "updates": ledger["done"],
        "time_total_s": time_before_s + result["time_total_s"],
        "episode_return_mean": training.get("episode_return_mean"),
        "episode_length_mean": training.get("episode_len_mean"),
    }
    learner = result.get("info", {}).get("learner", {}).get("default_policy", {})
    row |= {f"learner/{n}": float(v) for n, v in learner.get("learner_stats", {}).items()}
    if result["config"]["num_env_runners"] > 0:
        staleness = {n: v for n, v in ledger.items() if n.startswith("staleness")}
        row |= {f"sampling/{name}": value for name, value in staleness.items()}
        row |= {f"faults/{name}": float(count) for name, count in result["faults"].items()}
    evaluation = result.get("evaluation", {}).get("env_runners")
    if evaluation:
        row |= evaluation_columns(evaluation)
    return {name: plain_value(name, value) for name, value in row.items()}


def evaluation_columns(episodes: Mapping[str, Any]) -> dict[str, float | int]:
    """Returns the "evaluation/…" columns of RLlib's summary of evaluation episodes ("env_runners").

    The critics' bias is there where a policy has critics, and an episode long enough to judge them.
    """
    stats = episodes["hist_stats"]
    returns = np.asarray(stats["episode_reward"])
    columns: dict[str, float | int] = {
        RETURN: float(returns.mean()),
        "evaluation/return_std": float(returns.std()),
        "evaluation/return_min": float(returns.min()),
        "evaluation/return_max": float(returns.max()),
        "evaluation/length_mean": float(episodes["episode_len_mean"]),
        "evaluation/episodes": len(returns),
    }
    if "q_predicted" in stats:
        predicted, observed = np.mean(stats["q_predicted"]), np.mean(stats["q_observed"])
        columns |= {
            "evaluation/q_predicted": float(predicted),
            "evaluation/q_observed": float(observed),
            "evaluation/q_overestimation": float(predicted - observed),
        }
    return columns


def plain_value(name: str, value: object) -> Value:
    """Returns `value` as JSON knows it: numpy's numbers become Python's, NaN and infinities null.

    Raises:
        ValueError: the metric `name` is neither a number nor a text.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise ValueError(f"The metric {name}={value!r} is not allowed: it must be a number or a text.")


def number(row: Mapping[str, Value], name: str) -> float | None:
    """Returns the column `name` of `row`; None if it is missing, no number, or not finite."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def points(rows: Sequence[Mapping[str, Value]], name: str) -> list[tuple[int, float]]:
    """Returns (env_steps, value) of the rows in which the column `name` is a finite number."""
    return [
        (int(row["env_steps"] or 0), value)
        for row in rows
        if (value := number(row, name)) is not None
    ]
