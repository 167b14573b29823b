"""What `qvpo tune` relies on in Ray Tune beyond its documented interface.

Tune's saved state of an experiment: Tune overwrites these files in place, a megabyte now and then.
A driver that is killed meanwhile leaves one that is cut short, and without it nothing can go on:
so the last whole copy is kept.

Tune's controller, which schedulers are handed: what it runs, and how to pause a trial and to end
the experiment early.
"""

import copy
import json
import logging
import pickle
import signal
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback, Tuner
from ray.tune.execution import tune_controller
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from qvpo_rllib.files import DISK_ERRORS, write_atomically

TUNE_DIRECTORY, KEPT_DIRECTORY = "tune", "tune_state"  # in that of a part of the experiment
TRIALS_STATE = "experiment_state-*.json"
STATES = "[!.]*state*-*"  # of the experiment, the search and the callbacks: JSON, or pickled


def back_up(part: Path) -> None:
    """Copies the state files that are whole and have changed since the last backup."""
    kept = part / KEPT_DIRECTORY
    for file in (part / TUNE_DIRECTORY).glob(STATES):
        backup = kept / file.name
        if backup.exists() and backup.stat().st_mtime_ns >= file.stat().st_mtime_ns:
            continue
        data = file.read_bytes()
        if _is_whole(data):
            kept.mkdir(exist_ok=True)
            write_atomically(backup, data)


def has_state(part: Path) -> bool:
    """Returns whether Tune has written down the trials of `part`, so that it can go on."""
    directory = part / TUNE_DIRECTORY
    return (directory / "tuner.pkl").exists() and any(directory.glob(TRIALS_STATE))


def repair(part: Path) -> None:
    """Puts the kept copies in the place of state files that are cut short.

    Raises:
        ValueError: there is no copy of one.
    """
    for file in (part / TUNE_DIRECTORY).glob(STATES):
        if _is_whole(file.read_bytes()):
            continue
        backup = part / KEPT_DIRECTORY / file.name
        if not backup.exists():
            raise ValueError(
                f"Ray Tune's state of the experiment, {str(file)!r}, was cut short before it was "
                "whole for the first time, so the experiment cannot go on. Nothing was changed: "
                "give another --storage, or delete the experiment's directory."
            )
        write_atomically(file, backup.read_bytes())


def correct(part: Path, ended: Collection[str]) -> None:
    """Corrects Tune's saved state, so that an experiment can go on.

    The trials with the ids `ended` have ended: Tune saves its state now and then, and after a crash
    it would train them again. And what it had decided to do with a trial after a save that never
    came is forgotten: it would do that, such as end the trial, after the next save.
    """
    file = max((part / TUNE_DIRECTORY).glob(TRIALS_STATE))
    state = json.loads(file.read_text())
    for pair in state["trial_data"]:
        trial = json.loads(pair[0])
        if trial["trial_id"] in ended:
            pair[0] = json.dumps({**trial, "status": Trial.TERMINATED})
    for decisions in ("_cached_trial_decisions", "_queued_trial_decisions"):
        state["runner_data"][decisions] = {}
    write_atomically(file, json.dumps(state).encode())


def known_settings(part: Path, space: Mapping[str, Any]) -> dict[str, Any]:
    """Returns of `space` what Tune knows, as it takes nothing else when an experiment goes on.

    An earlier version of this package did not have the other options. They keep their defaults in
    its new trials too.
    """
    state = pickle.loads((part / TUNE_DIRECTORY / "tuner.pkl").read_bytes())
    # A setting that is a dict is known by its items: "evaluation_config/explore".
    names = {key.partition("/")[0] for key in state["__flattened_param_space_keys"]}
    return {n: value for n, value in space.items() if n in names or value == {}}


def disk_error(error: BaseException | None) -> OSError | None:
    """Returns the disk's trouble that a trial's error comes from, if it does."""
    cause = getattr(error, "cause", None)  # Ray's error has what the trial raised
    return cause if isinstance(cause, OSError) and cause.errno in DISK_ERRORS else None


def hide_disk_errors() -> None:
    """Keeps Tune's trace of a trial's failure off the screen where the disk is to blame."""
    logging.getLogger(tune_controller.__name__).addFilter(_is_not_of_the_disk)


def _is_not_of_the_disk(record: logging.LogRecord) -> bool:
    return not (record.exc_info and disk_error(record.exc_info[1]))


def callbacks_of(tuner: Tuner) -> list[Callback]:
    """Returns the callbacks of a `Tuner`, also of one that was restored."""
    callbacks: list[Callback] = tuner._local_tuner.get_run_config().callbacks
    return callbacks


def running_trials(controller: TuneController) -> list[Trial]:
    """Returns the trials that train, or save, at this moment."""
    return [trial for trial in controller.get_trials() if trial.status == Trial.RUNNING]


def keep_together(controller: TuneController, trial: Trial) -> None:
    """Lets a new trial write to where the experiment is.

    A search that goes on makes its trials for where it began, though the directory may have been
    moved since. To be called before the trial starts.
    """
    experiment = controller._tune_controller._storage  # schedulers are handed a wrapper
    storage = copy.copy(trial.storage)
    for name in ("storage_filesystem", "storage_fs_path", "experiment_dir_name"):
        setattr(storage, name, getattr(experiment, name))
    trial.set_storage(storage)


def pause(controller: TuneController, trial: Trial) -> bool:
    """Lets a trial save and stop; returns False, doing nothing, if it is saving already.

    A save after an iteration says nothing of what came since: try again at the next step.
    """
    if trial.is_saving:
        return False
    controller.pause_trial(trial)
    return True


def end_experiment() -> None:
    """Ends `Tuner.fit` after the controller's present step; trials that are paused can go on."""
    # It would report as an error that trials are not complete.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    # Tune's own signal for it. SIGINT is not: see TUNE_DISABLE_SIGINT_HANDLER in `cli.tune`.
    signal.raise_signal(signal.SIGUSR1)


def _is_whole(data: bytes) -> bool:
    if not data.startswith(b"{"):
        return data.endswith(b".")  # a pickle's last operation
    try:
        json.loads(data)
    except ValueError:
        return False
    return True
