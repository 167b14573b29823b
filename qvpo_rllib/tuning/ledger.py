"""What became of every trial, in files of its own: crash-safe, and readable without Ray.

    trials.json            trial → what sets it apart, status, env steps, starts, error
    results/<trial>.jsonl  one row per evaluation, by the names of a run's `metrics.jsonl`

Ray Tune's own `result.json` is copied to the experiment from time to time: a killed driver may
leave it behind. These are written at once.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback

from qvpo_rllib.files import write_atomically
from qvpo_rllib.training.rows import evaluation_columns
from qvpo_rllib.tuning.results import (
    FAILED,
    FINISHED,
    RESULTS,
    RUNNING,
    STOPPED,
    TRIALS_FILE,
    read_trials,
)
from qvpo_rllib.tuning.table import TrialTable
from qvpo_rllib.tuning.tune_state import back_up
from qvpo_rllib.tuning.tuner import STEPS


class TrialLedger(Callback):  # type: ignore[misc]
    """A Ray Tune callback that keeps the ledger of `directory` and shows it.

    Args:
        directory: where it goes; not Tune's own, whose files Tune copies back and forth.
        swept: the options that set trials apart, beside env and seed.
        env_steps: at which a trial has finished.
        num_trials: how many there will be.
        title: names the experiment on the screen.
    """

    def __init__(
        self, directory: Path, swept: Sequence[str], env_steps: int, num_trials: int, title: str
    ) -> None:
        self.directory = directory
        self.names = ("env", "seed", *swept)
        self.env_steps = env_steps
        self.num_trials = num_trials
        self.title = title
        self.trials: dict[str, dict[str, Any]] = {}
        self._table: TrialTable | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; a screen cannot be."""
        return {**self.__dict__, "_table": None}

    def setup(self, stop: Any = None, num_samples: Any = None, **info: Any) -> None:
        self.trials = read_trials(self.directory)
        (self.directory / RESULTS).mkdir(parents=True, exist_ok=True)
        for file in (self.directory / RESULTS).glob("*.jsonl"):
            if not file.read_bytes().endswith(b"\n"):  # a crash cut its last line short
                with file.open("ab") as end:
                    end.write(b"\n")
        self._table = TrialTable(self.title, self.names, self.env_steps, self.num_trials)
        self._table.start(self.trials)

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        entry = self._entry(trial)
        entry["status"] = RUNNING
        entry["starts"].append(time.strftime("%Y-%m-%dT%H:%M:%S"))
        self._write(trial, note=len(entry["starts"]) == 1)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        row = result_row(result)
        entry = self._entry(trial)
        entry |= {n: row.get(n) for n in ("env_steps", "evaluation/return_mean", "time_total_s")}
        with (self.directory / RESULTS / f"{trial.trial_id}.jsonl").open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
        self._write(trial)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        entry = self._entry(trial)
        whole = (entry.get("env_steps") or 0) >= self.env_steps
        entry["status"] = FINISHED if whole else STOPPED
        self._write(trial, note=True)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        file = trial.error_file
        lines = Path(file).read_text().strip().splitlines() if file else []
        self._entry(trial).update(status=FAILED, error=lines[-1] if lines else "unknown")
        self._write(trial, note=True)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        back_up(self.directory)
        if self._table is not None:
            self._table.refresh(self.trials)

    def on_experiment_end(self, trials: Any, **info: Any) -> None:
        if self._table is not None:
            self._table.stop(self.trials)

    def _entry(self, trial: Any) -> dict[str, Any]:
        return self.trials.setdefault(
            trial.trial_id,
            {
                "name": str(trial),
                "directory": Path(trial.path).name,
                "config": {name: trial.config[name] for name in self.names},
                "status": RUNNING,
                "starts": [],
            },
        )

    def _write(self, trial: Any, note: bool = False) -> None:
        text = json.dumps({"env_steps": self.env_steps, "trials": self.trials}, indent=1)
        write_atomically(self.directory / TRIALS_FILE, text.encode() + b"\n")
        if self._table is not None and note:
            self._table.note(self.trials[trial.trial_id])


def result_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result of RLlib's as a row of `metrics.jsonl`: the same names."""
    evaluation = result.get("evaluation", {}).get("env_runners", {})
    training = result["env_runners"]
    stats = result.get("info", {}).get("learner", {}).get("default_policy", {})
    row = {
        "env_steps": result[STEPS],
        "updates": result.get("ledger", {}).get("done"),
        "time_total_s": result["time_total_s"],
        "episode_return_mean": training.get("episode_return_mean"),
        "episode_length_mean": training.get("episode_len_mean"),
        **{f"learner/{n}": v for n, v in stats.get("learner_stats", {}).items()},
    }
    if evaluation:
        row |= evaluation_columns(evaluation)
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if abs(number) < float("inf") else None
