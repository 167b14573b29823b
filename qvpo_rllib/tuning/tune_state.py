"""What `qvpo tune` relies on in Ray Tune beyond its documented interface.

Tune's saved state of an experiment: Tune overwrites these files in place, a megabyte now and then.
A driver that is killed meanwhile leaves one that is cut short, and without it nothing can go on:
so the last whole copy is kept.

Tune's controller, which schedulers are handed: what it runs, how to pause a trial and to end the
experiment early, and what searches and schedulers have to be told when an experiment goes on.
"""

import contextlib
import copy
import json
import logging
import pickle
import re
import signal
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback, Tuner
from ray.tune.execution import tune_controller
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler

from qvpo_rllib.files import DISK_ERRORS, write_atomically
from qvpo_rllib.training.rows import RETURN, points
from qvpo_rllib.tuning.results import read_rows

TUNE_DIRECTORY, KEPT_DIRECTORY = "tune", "tune_state"  # in that of a part of the experiment
TRIALS_STATE = "experiment_state-*.json"
STATES = "[!.]*state*-*"  # of the experiment, the search and the callbacks: JSON, or pickled
# What a state is of, and when the driver that wrote it was started: each writes files of its own.
KIND_AND_START = re.compile(r"(.*states?)-(.*)\.\w+")


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

    Where there is no copy, what that start of the driver wrote is deleted, and what an earlier one
    wrote counts: all of it, so that search and trials fit together.

    Raises:
        ValueError: there is neither a copy of one nor an earlier one.
    """
    kept = part / KEPT_DIRECTORY
    files = {file: _kind_and_start(file) for file in (part / TUNE_DIRECTORY).glob(STATES)}
    cut = [file for file in files if not _is_whole(file.read_bytes())]
    lost = [file for file in cut if not (kept / file.name).exists()]
    starts = {files[file][1] for file in lost}
    dropped = [file for file, (_, start) in files.items() if start in starts]
    left = {kind for kind, start in files.values() if start not in starts}
    if not {files[file][0] for file in dropped} <= left:
        raise ValueError(
            f"Ray Tune's state of the experiment, {str(lost[0])!r}, was cut short before it was "
            "whole for the first time, so the experiment cannot go on. Nothing was changed: "
            "give another --storage, or delete the experiment's directory."
        )
    for file in sorted(dropped, key=lost.__contains__):  # a kill in between: the next start goes on
        file.unlink()
    for file in set(cut) - set(dropped):
        write_atomically(file, (kept / file.name).read_bytes())


def known_trials(part: Path) -> set[str]:
    """Returns the ids of the trials in Tune's saved state: it goes on with these."""
    state = json.loads(_newest(part).read_text())
    return {json.loads(trial)["trial_id"] for trial, _ in state["trial_data"]}


def correct(part: Path, ended: Collection[str]) -> None:
    """Corrects Tune's saved state, so that an experiment can go on.

    The trials with the ids `ended` have ended: Tune saves its state now and then, and after a crash
    it would train them again. And what it had decided to do with a trial after a save that never
    came is forgotten: it would do that, such as end the trial, after the next save.
    """
    file = _newest(part)
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


def tell_search(controller: TuneController, trial: Trial) -> None:
    """Tells the search of a trial that has ended, as Tune does not when an experiment goes on.

    `correct` ends trials of which the search thinks that they run: it would wait for ever for them
    if no more may run at a time, and Optuna would learn nothing from them. A search that knows
    already is not changed.
    """
    search = controller.search_alg
    # Optuna without a limit to trials at a time would warn, with the whole result.
    known = getattr(getattr(search, "searcher", None), "_completed_trials", ())
    if trial.status != Trial.TERMINATED or trial.trial_id in known:
        return
    # Tune's own last result may be an earlier one.
    returns = points(read_rows(_part_of(controller), trial.trial_id), RETURN)
    with contextlib.suppress(KeyError):  # Optuna's state may lack a trial that Tune's has
        search.on_trial_complete(
            trial.trial_id, {search.metric: returns[-1][1]} if returns else None
        )


def tell_scheduler(
    scheduler: AsyncHyperBandScheduler, controller: TuneController, trial: Trial
) -> None:
    """Tells ASHA the results so far of a trial that was added; of a new trial there are none.

    Tune does not save what ASHA compares trials with: after a restart it would stop none of the
    first that reach a milestone, and compare the others with these alone.
    """
    for env_steps, value in points(read_rows(_part_of(controller), trial.trial_id), RETURN):
        result = {scheduler._time_attr: env_steps, scheduler._metric: value}
        scheduler.on_trial_result(controller, trial, result)  # what it decides was done then


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


def _part_of(controller: TuneController) -> Path:
    """Returns the directory of the part that a controller runs; schedulers are handed a wrapper."""
    return Path(controller._tune_controller._storage.experiment_fs_path).parent


def _newest(part: Path) -> Path:
    return max((part / TUNE_DIRECTORY).glob(TRIALS_STATE))


def _kind_and_start(file: Path) -> tuple[str, str]:
    found = KIND_AND_START.fullmatch(file.name)
    return (found[1], found[2]) if found else (file.name, "")


def _is_whole(data: bytes) -> bool:
    if not data.startswith(b"{"):
        return data.endswith(b".")  # a pickle's last operation
    try:
        json.loads(data)
    except ValueError:
        return False
    return True
