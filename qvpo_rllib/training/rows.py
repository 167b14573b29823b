"""An evaluation as columns of a metrics row."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def evaluation_columns(episodes: Mapping[str, Any]) -> dict[str, float | int]:
    """The "evaluation/…" columns of RLlib's summary of evaluation episodes ("env_runners").

    The critics' bias is there where a policy has critics, and an episode long enough to judge them.
    """
    stats = episodes["hist_stats"]
    returns = np.asarray(stats["episode_reward"])
    columns: dict[str, float | int] = {
        "evaluation/return_mean": float(returns.mean()),
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


def learner_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the learner's numbers in a result of `train()`; empty before the first update."""
    stats: Any = result
    for key in ("info", "learner", "default_policy", "learner_stats"):
        stats = stats.get(key, {})
    return {name: float(value) for name, value in stats.items()}


def worker_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns how far remote workers were behind, and what went wrong with them."""
    ledger = result["ledger"]
    return {
        **{f"sampling/{n}": ledger[n] for n in ("staleness_mean", "staleness_max") if n in ledger},
        **{f"faults/{name}": float(count) for name, count in result["faults"].items()},
    }
