"""Running an experiment to its end, however often it is cut short: the code of `qvpo tune`.

<storage>/<name>/
  experiment.json        the experiment, resolved, every planned trial, and for each start
                         command line, versions and machine
  <algorithm>/           the files of `TrialLedger`
    tune/                Ray Tune's: trials with TensorBoard files and checkpoints
  <algorithm>-confirm/   the same for the second stage, if there is one

Tune copies the files of its directory back and forth: ours are kept out of it.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from qvpo_rllib.algorithms import entry_of
from qvpo_rllib.core.options import Setting
from qvpo_rllib.files import LOCK_FILE, DirectoryLock, write_atomically
from qvpo_rllib.training.records import describe_start
from qvpo_rllib.tuning.interruption import INTERRUPTION
from qvpo_rllib.tuning.ledger import TrialLedger
from qvpo_rllib.tuning.results import FAILED, FINISHED, STOPPED, read_rows, read_trials
from qvpo_rllib.tuning.spec import ExperimentSpec
from qvpo_rllib.tuning.tune_state import TUNE_DIRECTORY, repair
from qvpo_rllib.tuning.tuner import build_tuner, confirmation_spec, planned_trials

EXPERIMENT_FILE = "experiment.json"
FORMAT = 1
STATE_FILES = "experiment_state-*.json"
LAST_EVALUATIONS = 3  # whose mean says how good a setting is


@dataclass(frozen=True)
class Part:
    """One Tune experiment: an algorithm's trials, or the confirmation of its best settings."""

    name: str
    algorithm: str
    spec: ExperimentSpec
    stage: str  # "search" or "confirm"

    @property
    def num_trials(self) -> int:
        planned = planned_trials(self.spec, self.algorithm)
        return len(planned) if planned is not None else int(self.spec.search.num_samples or 0)


class Experiment:
    """An experiment in a directory of its own. Raises `ValueError` if another one is there.

    Before `run`, enter `writing`.
    """

    def __init__(self, spec: ExperimentSpec) -> None:
        self.spec = spec
        self.directory = (Path(spec.storage).expanduser() / spec.name).absolute()
        self.parts = [Part(name, name, spec, "search") for name in spec.algorithms]
        self._starts: list[dict[str, Any]] = []
        self._adopt()

    @property
    def complete(self) -> bool:
        return all(self._part_complete(part) for part in self.all_parts())

    def all_parts(self) -> list[Part]:
        """The parts known so far: a confirmation is known once its search has ended."""
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
        """Runs what is left; says whether all trials have ended well.

        `INTERRUPTION` ends it early; `complete` is then false.

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
                second = self._confirmation(part)
                self._record(self.all_parts())
                if not self._run_part(second, callbacks):
                    return False
        return True

    def failures(self) -> list[str]:
        """A line for every failed trial."""
        return [
            f"{entry['name']}: {entry.get('error', 'unknown error')}"
            for part in self.all_parts()
            for entry in read_trials(self.directory / part.name).values()
            if entry["status"] == FAILED
        ]

    def _adopt(self) -> None:
        """The directory is new, or holds this very experiment."""
        file = self.directory / EXPERIMENT_FILE
        if not file.exists():
            found = self.directory.iterdir() if self.directory.exists() else ()
            if {entry.name for entry in found} - {LOCK_FILE}:
                raise ValueError(
                    f"{str(self.directory)!r} holds other files and no experiment of `qvpo tune`. "
                    "Give another --storage, or another name in the file."
                )
            return
        record = json.loads(file.read_text())
        self._starts, found = record["starts"], record["spec"]
        own = _json(self.spec.to_dict())
        # What an older version did not know is unchanged while it is empty.
        asked = [n for n in own if n != "storage" and (n in found or own[n])]
        changed = [n for n in asked if found.get(n) != own[n]]
        if changed:
            raise ValueError(
                f"{str(self.directory)!r} holds an experiment with other values of "
                f"{', '.join(changed)}. To go on with it, use its file unchanged; for the changed "
                "one give another --storage or name. Nothing was changed."
            )

    def _record(self, parts: Sequence[Part]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        record = {
            "format": FORMAT,
            "starts": self._starts,
            "spec": self.spec.to_dict(),
            "parts": [
                {
                    "name": part.name,
                    "algorithm": part.algorithm,
                    "label": entry_of(part.algorithm).label,
                    "stage": part.stage,
                    "swept": list(part.spec.swept),
                    "trials": planned_trials(part.spec, part.algorithm),
                    "num_trials": part.num_trials,
                }
                for part in parts
            ],
        }
        text = json.dumps(_json(record), indent=1)
        write_atomically(self.directory / EXPERIMENT_FILE, text.encode() + b"\n")

    def _run_part(self, part: Part, callbacks: Sequence[tune.Callback]) -> bool:
        if self._part_complete(part):
            return True
        if INTERRUPTION.asked:
            return False
        tuner = self._restored(part) or self._fresh(part, callbacks)
        tuner.fit()
        return self._part_complete(part)

    def _fresh(self, part: Part, callbacks: Sequence[tune.Callback]) -> tune.Tuner:
        directory = self.directory / part.name
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

    def _restored(self, part: Part) -> tune.Tuner | None:
        directory = self.directory / part.name / TUNE_DIRECTORY
        if not (directory / "tuner.pkl").exists() or not any(directory.glob(STATE_FILES)):
            return None
        repair(directory.parent)
        _mark_ended(directory, read_trials(directory.parent))
        return tune.Tuner.restore(
            str(directory), entry_of(part.algorithm).load(), resume_errored=True
        )

    def _title(self, part: Part) -> str:
        return self.spec.name if len(self.all_parts()) == 1 else f"{self.spec.name}/{part.name}"

    def _part_complete(self, part: Part) -> bool:
        entries = read_trials(self.directory / part.name).values()
        ended = [entry for entry in entries if entry["status"] in (FINISHED, STOPPED)]
        return len(ended) >= part.num_trials

    def _confirmation(self, part: Part) -> Part:
        spec = confirmation_spec(part.spec, self._best_settings(part))
        return Part(f"{part.algorithm}-confirm", part.algorithm, spec, "confirm")

    def _best_settings(self, part: Part) -> list[Setting]:
        """By the mean of the last evaluations, among the trials that were trained longest."""
        assert self.spec.confirm is not None
        directory = self.directory / part.name
        scores = []
        for trial, entry in read_trials(directory).items():
            rows = read_rows(directory, trial)
            returns = [row["evaluation/return_mean"] for row in rows][-LAST_EVALUATIONS:]
            if entry["status"] == FINISHED and returns:
                setting = {name: entry["config"][name] for name in part.spec.swept}
                scores.append((sum(returns) / len(returns), setting))
        scores.sort(key=lambda scored: -scored[0])
        best: list[Setting] = []
        for _, setting in scores:
            if setting not in best:
                best.append(setting)
        return best[: self.spec.confirm.top]


def _mark_ended(directory: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Tells Tune's saved state of trials that ended after it was saved.

    Tune saves its state now and then: after a crash it would train such a trial again.
    """
    ended = {trial for trial, e in entries.items() if e["status"] in (FINISHED, STOPPED)}
    file = max(directory.glob(STATE_FILES))
    state = json.loads(file.read_text())
    for pair in state["trial_data"]:
        trial = json.loads(pair[0])
        if trial["trial_id"] in ended and trial["status"] != "TERMINATED":
            pair[0] = json.dumps({**trial, "status": "TERMINATED"})
    write_atomically(file, json.dumps(state).encode())


def _json(value: Any) -> Any:
    """As it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(value))
