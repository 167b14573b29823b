"""Running an experiment to its end, however often it is cut short: the code behind `qvpo tune`.

<storage>/<name>/
  experiment.json        the experiment, resolved, every planned trial, and for each start
                         command line, versions and machine
  <algorithm>/           the files of `results`, and copies of Tune's state (`tune_state`)
    tune/                Ray Tune's: trials with TensorBoard files and checkpoints
  <algorithm>-confirm/   the same for the second stage, if there is one

Tune copies the files of its directory back and forth: ours are kept out of it.
"""

import contextlib
import json
import math
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from qvpo_rllib.algorithms import entry_of
from qvpo_rllib.core.options import Setting
from qvpo_rllib.files import LOCK_FILE, DirectoryLock, read_json, write_json
from qvpo_rllib.training.records import describe_start
from qvpo_rllib.training.rows import RETURN, points
from qvpo_rllib.tuning.interruption import INTERRUPTION
from qvpo_rllib.tuning.ledger import TrialLedger
from qvpo_rllib.tuning.results import (
    FAILED,
    FINISHED,
    STOPPED,
    Entry,
    delete_rows,
    read_rows,
    read_trials,
    write_trials,
)
from qvpo_rllib.tuning.spec import ExperimentSpec
from qvpo_rllib.tuning.tune_state import (
    TUNE_DIRECTORY,
    callbacks_of,
    correct,
    has_state,
    known_settings,
    known_trials,
    repair,
)
from qvpo_rllib.tuning.tuner import build_tuner, confirmation_spec, planned_trials, whole_space

EXPERIMENT_FILE = "experiment.json"
LAST_EVALUATIONS = 3  # whose mean says how good a setting is


@dataclass(frozen=True)
class Part:
    """One Tune experiment: an algorithm's trials, or the confirmation of its best settings.

    Attributes:
        name: of its directory within the experiment's.
        algorithm: a name in `ALGORITHMS`.
        spec: what its trials are.
        stage: "search" or "confirm".
    """

    name: str
    algorithm: str
    spec: ExperimentSpec
    stage: str

    @property
    def num_trials(self) -> int:
        planned = planned_trials(self.spec, self.algorithm)
        return len(planned) if planned is not None else int(self.spec.search.num_samples or 0)


class Experiment:
    """An experiment in a directory of its own. Before `run`, enter `writing`.

    Raises:
        ValueError: the directory holds another experiment, or other files.
    """

    def __init__(self, spec: ExperimentSpec) -> None:
        self.spec = spec
        self.directory = (Path(spec.storage).expanduser() / spec.name).absolute()
        self.parts = [Part(name, name, spec, "search") for name in spec.algorithms]
        self._starts: list[dict[str, Any]] = []
        self._adopt()

    @property
    def complete(self) -> bool:
        """Whether all trials have ended well."""
        return all(self._part_complete(part) for part in self.all_parts())

    def all_parts(self) -> list[Part]:
        """Returns the parts known so far: a confirmation is known once its search has ended."""
        parts = list(self.parts)
        if self.spec.confirm is not None:
            parts += [self._confirmation(p) for p in self.parts if self._part_complete(p)]
        return parts

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other programs from writing to the directory; it is made if need be.

        Raises:
            ValueError: another program is running the experiment. Nothing was changed.
        """
        missing = [p for p in (self.directory, *self.directory.parents) if not p.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with DirectoryLock(self.directory):
                self._adopt()  # another program may have gone on with it since
                yield
        finally:
            with contextlib.suppress(OSError):  # the first that is not empty
                for made in missing:
                    made.rmdir()

    def run(self, callbacks: Sequence[tune.Callback] = (), command: Sequence[str] = ()) -> bool:
        """Runs what is left; returns whether all trials have ended well.

        An interruption (`INTERRUPTION`) ends it early; then not all have.

        Args:
            callbacks: of Ray Tune.
            command: the command line, for the record.
        """
        self._starts.append(describe_start(command))
        self._record(self.all_parts())
        for part in self.parts:
            if not self._run_part(part, callbacks):
                return False
            if self.spec.confirm is not None:
                self._record(self.all_parts())
                if not self._run_part(self._confirmation(part), callbacks):
                    return False
        return True

    def failures(self) -> list[str]:
        """Returns a line for every failed trial."""
        return [
            f"{entry['name']}: {entry.get('error', 'unknown error')}"
            for part in self.all_parts()
            for entry in self._entries(part, FAILED).values()
        ]

    def _adopt(self) -> None:
        """Reads the starts so far; `ValueError` if the directory is something else's."""
        file = self.directory / EXPERIMENT_FILE
        if not file.exists():
            found = self.directory.iterdir() if self.directory.exists() else ()
            if {entry.name for entry in found} - {LOCK_FILE}:
                raise ValueError(
                    f"{str(self.directory)!r} holds other files and no experiment of `qvpo tune`. "
                    "Give another --storage, or another name in the file."
                )
            return
        advice = "Restore it, or give another --storage to begin anew."
        record = read_json(file, dict, advice, {"starts": list, "spec": dict})
        self._starts = record["starts"]
        given = json.loads(json.dumps(self.spec.to_dict()))  # as it comes back: tuples are lists
        # An empty env_config is left out of the record.
        own, recorded = ({"env_config": {}, **values} for values in (given, record["spec"]))
        changed = [n for n in own if recorded.get(n) != own[n]]
        if changed:
            raise ValueError(
                f"{str(self.directory)!r} holds an experiment with other values of "
                f"{', '.join(changed)}. To go on with it, use its file unchanged; for the changed "
                "one give another --storage or name. Nothing was changed."
            )

    def _record(self, parts: Sequence[Part]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        record = {
            "starts": self._starts,
            "spec": self.spec.to_dict(),
            "parts": [
                {
                    "name": part.name,
                    "algorithm": part.algorithm,
                    "label": entry_of(part.algorithm).label,
                    "stage": part.stage,
                    "swept": list(part.spec.swept),
                    "left_out": part.spec.left_out(part.algorithm),
                    "trials": planned_trials(part.spec, part.algorithm),
                    "num_trials": part.num_trials,
                }
                for part in parts
            ],
        }
        write_json(self.directory / EXPERIMENT_FILE, record)

    def _run_part(self, part: Part, callbacks: Sequence[tune.Callback]) -> bool:
        if self._part_complete(part):
            return True
        if INTERRUPTION.asked:
            return False
        tuner = self._restored(part, callbacks) or self._fresh(part, callbacks)
        tuner.fit()
        return self._part_complete(part)

    def _fresh(self, part: Part, callbacks: Sequence[tune.Callback]) -> tune.Tuner:
        directory = self.directory / part.name
        if any(read_rows(directory, trial) for trial in read_trials(directory)):
            raise ValueError(
                f"{str(directory)!r} holds results of trials, but not what Ray Tune needs to go on "
                f"with them: its {TUNE_DIRECTORY!r} directory is missing or not whole. Restore it, "
                "or give another --storage to begin anew. Nothing was changed."
            )
        if directory.exists():  # killed before Tune wrote down any trial
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
        ledger = TrialLedger(
            directory, part.spec.swept, part.spec.env_steps, part.num_trials, self._title(part)
        )
        return build_tuner(
            part.spec,
            part.algorithm,
            directory=directory / TUNE_DIRECTORY,
            callbacks=[ledger, *callbacks],
        )

    def _restored(self, part: Part, callbacks: Sequence[tune.Callback] = ()) -> tune.Tuner | None:
        directory = self.directory / part.name
        if not has_state(directory):
            return None
        repair(directory)
        self._forget_lost(part)
        correct(directory, self._entries(part, FINISHED, STOPPED).keys())
        tuner = tune.Tuner.restore(
            str(directory / TUNE_DIRECTORY),
            entry_of(part.algorithm).load(),
            resume_errored=True,
            param_space=known_settings(directory, whole_space(part.spec, part.algorithm)),
        )
        restored = callbacks_of(tuner)
        for callback in restored:
            if isinstance(callback, TrialLedger):
                callback.directory = directory
        # Loggers that were not asked for when it began.
        restored += [c for c in callbacks if type(c) not in map(type, restored)]
        return tuner

    def _forget_lost(self, part: Part) -> None:
        """Drops the trials that were running and that Tune had not saved before a kill.

        Others take their place, in a search with other ids. Those that have ended count.
        """
        directory = self.directory / part.name
        known, trials = known_trials(directory), read_trials(directory)
        ended = self._entries(part, FINISHED, STOPPED)
        lost = trials.keys() - known - ended.keys()
        for trial in lost:
            delete_rows(directory, trial)
        if lost:
            write_trials(directory, {t: e for t, e in trials.items() if t not in lost})

    def _title(self, part: Part) -> str:
        return self.spec.name if len(self.all_parts()) == 1 else f"{self.spec.name}/{part.name}"

    def _entries(self, part: Part, *statuses: str) -> dict[str, Entry]:
        """Returns trial id → entry of the trials with one of these statuses."""
        trials = read_trials(self.directory / part.name)
        return {trial: entry for trial, entry in trials.items() if entry["status"] in statuses}

    def _part_complete(self, part: Part) -> bool:
        return len(self._entries(part, FINISHED, STOPPED)) >= part.num_trials

    def _confirmation(self, part: Part) -> Part:
        spec = confirmation_spec(part.spec, self._best_settings(part))
        return Part(f"{part.algorithm}-confirm", part.algorithm, spec, "confirm")

    def _best_settings(self, part: Part) -> list[Setting]:
        """Returns those to confirm: the best by the mean over seeds of their last evaluations.

        Tasks have returns of different sizes: with several, a setting's ranks on them are added up.
        A setting of which a trial has not ended, as the search stopped it, comes behind the others.
        """
        assert self.spec.confirm is not None
        settings: dict[str, Setting] = {}
        scores: dict[str, dict[str, list[float]]] = {}  # by setting and task, one of each seed
        cut = set()
        for trial, entry in read_trials(self.directory / part.name).items():
            setting = {name: entry["config"][name] for name in part.spec.swept}
            key = json.dumps(setting)
            evaluations = points(read_rows(self.directory / part.name, trial), RETURN)
            returns = [value for _, value in evaluations[-LAST_EVALUATIONS:]]
            if entry["status"] == FINISHED and returns:
                settings[key] = setting
                of_task = scores.setdefault(key, {}).setdefault(entry["config"]["env"], [])
                of_task.append(statistics.fmean(returns))
            else:
                cut.add(key)
        means = {
            key: [statistics.fmean(by_task.get(task, [-math.inf])) for task in part.spec.tasks]
            for key, by_task in scores.items()
        }

        def better(key: str) -> int:
            """How many settings are better than `key`, summed over tasks."""
            pairs = (zip(other, means[key], strict=True) for other in means.values())
            return sum(theirs > own for pair in pairs for theirs, own in pair)

        best = sorted(settings, key=lambda key: (key in cut, better(key)))
        return [settings[key] for key in best[: self.spec.confirm.top]]
