"""SIGTERM and Ctrl-C under `qvpo tune`: running trials save where they are, and go on later.

Ray Tune by itself kills its trials then, and a run that goes on takes each of them up at its last
checkpoint. Here the schedulers pause them, which for Tune means: save, stop, and go on some day.
The rest is Tune's own way to end early; a paused trial is one that it takes up on resume.
"""

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from qvpo_rllib.runtime.ray_private import ask_trials_to_stop

# For all trials together. Slurm gives 120 s here (cluster/slurm.sh), and Ray's end takes its part.
TIME_LIMIT_S = 90.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """What has come of SIGTERM and Ctrl-C in this process.

    Attributes:
        asked: one has come.
        unsaved: names of the trials that could not save in time; they go on from their last
            checkpoints.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.asked = False
        self.unsaved: list[str] = []
        self._ends_s = float("inf")
        self._waited_for: set[str] | None = None
        self._pausing: set[str] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Signals are kept here instead of ending what happens to be going on."""
        self._begin()
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Again after `ray.init`, which takes SIGTERM for itself."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self._ends_s == 0:
            raise KeyboardInterrupt  # the third one: Tune does not react any more
        self._ends_s = 0 if self.asked else time.monotonic() + TIME_LIMIT_S
        self.asked = True

    def go_on(self, controller: Any) -> None:
        """Pauses the trials, and ends the experiment when they have saved or the time is up.

        Args:
            controller: of Ray Tune, as schedulers get it. To be called at each of its steps.
        """
        running = [trial for trial in controller.get_trials() if trial.status == Trial.RUNNING]
        if self._waited_for is None:
            ask_trials_to_stop()
            # Trials that start from now on, on what others leave, have nothing to lose.
            self._waited_for = {trial.trial_id for trial in running}
            print(
                f"Interrupted: {len(running)} trials save where they are and stop, within "
                f"{TIME_LIMIT_S:g} s. Once more ends them at once.",
                file=sys.stderr,
                flush=True,
            )
        waited_for = [trial for trial in running if trial.trial_id in self._waited_for]
        for trial in waited_for:
            # A save after an iteration may be underway; it says nothing of what came since.
            if trial.trial_id not in self._pausing and not trial.is_saving:
                self._pausing.add(trial.trial_id)
                controller.pause_trial(trial)
        if not waited_for or time.monotonic() > self._ends_s:
            self.unsaved = [str(trial) for trial in waited_for]
            # It would report as an error that trials are not complete.
            logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
            # Tune's own signal for it, which it takes at the end of this step; see `cli.tune`.
            signal.raise_signal(signal.SIGUSR1)


INTERRUPTION = Interruption()


class _Pausing:
    """To be put before one of Ray Tune's schedulers."""

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        if INTERRUPTION.asked:
            INTERRUPTION.go_on(tune_controller)
            return None
        return super().choose_trial_to_run(tune_controller)  # type: ignore[misc]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        if INTERRUPTION.asked and decision == TrialScheduler.CONTINUE:
            return str(TrialScheduler.PAUSE)
        return decision


class PausingFIFO(_Pausing, FIFOScheduler):  # type: ignore[misc]
    """Trials in their order."""


class PausingASHA(_Pausing, AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA."""


class PausingPBT(_Pausing, PopulationBasedTraining):  # type: ignore[misc]
    """PBT."""
