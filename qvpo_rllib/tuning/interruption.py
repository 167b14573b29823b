"""SIGTERM and Ctrl-C under `qvpo tune`: running trials save where they are, and go on later.

Ray Tune by itself kills its trials then, and a run that goes on takes each of them up at its last
checkpoint. Here the schedulers pause them, which for Tune means: save, stop, and go on some day.
The rest is Tune's own way to end early; a paused trial is one that it takes up on resume.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from qvpo_rllib.runtime.ray_private import ask_trials_to_stop
from qvpo_rllib.tuning.tune_state import (
    end_experiment,
    keep_together,
    pause,
    running_trials,
    tell_scheduler,
    tell_search,
)

# For all trials together. Slurm gives 120 s here (cluster/slurm.sh), and Ray's end takes its part.
TIME_LIMIT_S = 90.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger(__name__)


class Interruption:
    """What has come of SIGTERM and Ctrl-C in this process.

    Attributes:
        asked: one has come.
        unsaved: names of the trials that could not save in time; they go on from their last
            checkpoints.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.asked = False
        self.unsaved: list[str] = []
        self._ends_s = float("inf")
        self._waited_for: set[str] | None = None  # ids of the trials that are to save
        self._pausing: set[str] = set()  # ids of those that have been told to

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notes the signals, in the block, instead of letting them end what is going on."""
        self._reset()
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Takes the signals; call it again after `ray.init`, which takes SIGTERM for itself."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ends_s == 0:
            raise KeyboardInterrupt  # the third one: Tune does not react any more
        self._ends_s = 0 if self.asked else time.monotonic() + TIME_LIMIT_S
        self.asked = True

    def pause_trials(self, controller: TuneController) -> None:
        """Pauses the trials, and ends the experiment when they have saved or the time is up.

        To be called at each step of the controller.
        """
        running = running_trials(controller)
        if self._waited_for is None:
            ask_trials_to_stop()
            # Trials that start from now on, on what others leave, have nothing to lose.
            self._waited_for = {trial.trial_id for trial in running}
            logger.warning(
                "Interrupted: %d trials save where they are and stop, within %g s. Once more ends "
                "them at once.",
                len(running),
                TIME_LIMIT_S,
            )
        waited_for = [trial for trial in running if trial.trial_id in self._waited_for]
        for trial in waited_for:
            if trial.trial_id not in self._pausing and pause(controller, trial):
                self._pausing.add(trial.trial_id)
        if not waited_for or time.monotonic() > self._ends_s:
            self.unsaved = [str(trial) for trial in waited_for]
            end_experiment()


INTERRUPTION = Interruption()


class _Pausing:
    """Pauses trials on an interruption; a class to be put before one of Ray Tune's schedulers."""

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        keep_together(tune_controller, trial)
        super().on_trial_add(tune_controller, trial)  # type: ignore[misc]
        tell_search(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        if INTERRUPTION.asked:
            INTERRUPTION.pause_trials(tune_controller)
            return None
        return super().choose_trial_to_run(tune_controller)  # type: ignore[misc]

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        if INTERRUPTION.asked and decision == TrialScheduler.CONTINUE:
            return str(TrialScheduler.PAUSE)
        return decision


class PausingFIFO(_Pausing, FIFOScheduler):  # type: ignore[misc]
    """Runs trials in their order."""


class PausingASHA(_Pausing, AsyncHyperBandScheduler):  # type: ignore[misc]
    """Stops trials early that are behind (ASHA)."""

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        tell_scheduler(self, tune_controller, trial)


class PausingPBT(_Pausing, PopulationBasedTraining):  # type: ignore[misc]
    """Lets trials copy better ones (population based training)."""
