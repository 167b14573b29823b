"""Results of experiments that were never run: every number in them is known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvpo_rllib.tuning.experiment import Experiment
from qvpo_rllib.tuning.spec import ExperimentSpec

Score = Callable[[dict[str, Any], float], float]
SWEEP = {
    "name": "sweep",
    "task": "InvertedPendulum-v5",
    "preset": "quick",
    "seeds": [0, 1, 2, 3],
    "env_steps": 4000,
    "sweep": {"settings": [{"k_behavior": 1}, {"k_behavior": 4}]},
}


def score(config: dict[str, Any], share: float) -> float:
    """K_b = 4 ends at 200 + seed, K_b = 1 at 100 + seed; both peak one evaluation before."""
    end = 200.0 if config["k_behavior"] == 4 else 100.0
    return end + config["seed"] + (7 if share == 0.75 else 0)


def make_results(
    storage: Path,
    values: dict[str, Any],
    score: Score,
    changes: dict[int, dict[str, Any]] | None = None,
) -> Path:
    """An experiment's directory in which all trials have ended.

    Args:
        values: the experiment, as in its file.
        score: (a trial's config, share of its env steps done) → evaluation return.
        changes: number of a trial → what differs in its entry; "rows": how many it has; None as
            the entry leaves it out, as if it had not been started.
    """
    spec = ExperimentSpec.from_dict({**values, "storage": str(storage)})
    experiment = Experiment(spec)
    experiment._record(experiment.parts)
    record = json.loads((experiment.directory / "experiment.json").read_text())
    for part in record["parts"]:
        directory = experiment.directory / part["name"]
        (directory / "results").mkdir(parents=True)
        trials = {}
        for number, config in enumerate(part["trials"]):
            change = (changes or {}).get(number, {})
            if change is None:
                continue
            change = dict(change)
            steps = range(spec.evaluation_interval, spec.env_steps + 1, spec.evaluation_interval)
            rows = [
                {
                    "env_steps": step,
                    "time_total_s": step / 40,
                    "evaluation/return_mean": score(config, step / spec.env_steps),
                }
                for step in steps
            ][: change.pop("rows", None)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (directory / "results" / f"t{number}.jsonl").write_text(text)
            trials[f"t{number}"] = {
                "name": f"trial {number}",
                "directory": f"trial-{number}",
                "config": config,
                "status": "finished",
                "starts": ["2026-01-01T00:00:00"],
                "env_steps": rows[-1]["env_steps"] if rows else None,
                **change,
            }
        (directory / "trials.json").write_text(json.dumps({"trials": trials}))
    return experiment.directory
