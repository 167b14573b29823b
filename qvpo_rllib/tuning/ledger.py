"""Recording an experiment's trials (`results`) as Ray Tune runs them, and showing them."""

import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from qvpo_rllib.training.rows import RETURN, metrics_row
from qvpo_rllib.tuning import results
from qvpo_rllib.tuning.results import FAILED, FINISHED, RUNNING, STOPPED, Entry
from qvpo_rllib.tuning.table import TrialTable
from qvpo_rllib.tuning.tune_state import back_up, disk_error, hide_disk_errors

OF_THE_LAST_ROW = ("env_steps", RETURN, "time_total_s")


class TrialLedger(Callback):  # type: ignore[misc]
    """A Ray Tune callback that keeps the files of `results` in `directory`, and shows the trials.

    It also backs up Tune's own state after each of Tune's steps.

    Args:
        directory: where the files go; not Tune's own, whose files Tune copies back and forth.
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
        self.trials: dict[str, Entry] = {}
        self._table: TrialTable | None = None
        self._disk_error: OSError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns what Tune pickles: without the table, since a screen cannot be pickled.

        Without the directory too, since it may have been moved when the experiment goes on: give
        the one it is in then.
        """
        return {**self.__dict__, "_table": None, "_disk_error": None, "directory": None}

    def setup(self, **info: Any) -> None:
        self.trials = results.read_trials(self.directory)
        results.prepare(self.directory)
        self._table = TrialTable(self.title, self.names, self.env_steps, self.num_trials)
        self._table.start(self.trials)
        hide_disk_errors()

    def on_trial_start(self, *, trial: Trial, **info: Any) -> None:
        entry = self._entry(trial)
        known = self._known(trial)
        # A trial that Tune had not saved before a kill begins again, in another directory and, in a
        # search, with other settings: nothing of its first try counts. A population's member that
        # copies another has other settings too, but its directory, and stays what it began as.
        if entry["directory"] != known["directory"]:
            results.delete_rows(self.directory, trial.trial_id)
            for name in OF_THE_LAST_ROW:
                entry.pop(name, None)
            entry.update(known)
        entry["status"] = RUNNING
        entry.pop("error", None)
        entry["starts"].append(time.strftime("%Y-%m-%dT%H:%M:%S"))
        self._write(trial, note=len(entry["starts"]) == 1)

    def on_trial_result(self, *, trial: Trial, result: Mapping[str, Any], **info: Any) -> None:
        row = metrics_row(result)
        self._entry(trial).update({name: row.get(name) for name in OF_THE_LAST_ROW})
        results.append_row(self.directory, trial.trial_id, row)
        self._write(trial)

    def on_trial_complete(self, *, trial: Trial, **info: Any) -> None:
        entry = self._entry(trial)
        whole = (entry.get("env_steps") or 0) >= self.env_steps
        entry["status"] = FINISHED if whole else STOPPED
        self._write(trial, note=True)

    def on_trial_error(self, *, trial: Trial, **info: Any) -> None:
        file = trial.error_file
        lines = Path(file).read_text().strip().splitlines() if file else []
        self._entry(trial).update(status=FAILED, error=lines[-1] if lines else "unknown")
        self._write(trial, note=True)
        pickled = trial.pickled_error_file  # not in the trial's directory yet
        if pickled and (error := disk_error(pickle.loads(Path(pickled).read_bytes()))):
            self._disk_error = OSError(error.errno, error.strerror, error.filename or trial.path)

    def on_step_end(self, **info: Any) -> None:
        """Raises `OSError` where a trial's disk failed: the others would only fail too."""
        if self._disk_error is not None:  # of all callbacks, Tune lets this one's errors through
            self.on_experiment_end()
            raise self._disk_error
        back_up(self.directory)
        if self._table is not None:
            self._table.refresh(self.trials)

    def on_experiment_end(self, **info: Any) -> None:
        if self._table is not None:
            self._table.stop(self.trials)

    def _entry(self, trial: Trial) -> Entry:
        entry = {**self._known(trial), "status": RUNNING, "starts": []}
        return self.trials.setdefault(trial.trial_id, entry)

    def _known(self, trial: Trial) -> Entry:
        return {
            "name": str(trial),
            "directory": Path(trial.path).name,
            "config": {name: trial.config[name] for name in self.names},
        }

    def _write(self, trial: Trial, note: bool = False) -> None:
        results.write_trials(self.directory, self.trials)
        if self._table is not None and note:
            self._table.note(self.trials[trial.trial_id])
