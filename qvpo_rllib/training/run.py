"""Runs the loop of `qvpo train`, from a plan to a run directory."""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from qvpo_rllib.checkpoints.metadata import Metadata
from qvpo_rllib.checkpoints.staging import committed
from qvpo_rllib.core.options import Options, completed
from qvpo_rllib.runtime.base import BaseAlgorithm
from qvpo_rllib.training.learning_curve import plot_learning_curve
from qvpo_rllib.training.plan import TrainingPlan
from qvpo_rllib.training.rows import RETURN, Row, evaluation_columns, metrics_row, number, points
from qvpo_rllib.training.run_directory import RunDirectory
from qvpo_rllib.training.status import TrainingStatus
from qvpo_rllib.training.trackers import Trackers

logger = logging.getLogger(__name__)


class TrainingRun:
    """Trains until the plan's env steps; evaluates, records and saves on the way.

    Args:
        plan: what to train.
        directory: where everything goes; `close` it afterwards.
        resume: go on from `checkpoints/last` of the directory.
    """

    def __init__(self, plan: TrainingPlan, directory: RunDirectory, *, resume: bool) -> None:
        self.plan = plan
        self.directory = directory
        self.algorithm: BaseAlgorithm = plan.config.build_algo()
        self.best = float("-inf")
        self.last: float | None = None
        self._time_before_s = 0.0
        self._evaluating = False
        self._trackers = Trackers(plan.log, directory.path, plan.to_dict())
        if resume:
            last = directory.checkpoint("last")
            saved, own = Metadata.read(committed(last)), self.algorithm.metadata()
            _say_what_has_changed(saved, own, plan.algorithm.hyperparameters)
            self.algorithm.restore(last)
            directory.metrics.truncate_after(self.env_steps)
            self._read_history()
            directory.change_config(plan.to_dict())
        self.status = TrainingStatus(
            plan.env_steps, title=f"{plan.algorithm.label} {plan.env} {plan.preset}"
        )
        self._saved_at = self.env_steps if resume else -1
        self._clock = CheckpointClock(plan.checkpoint_env_steps, plan.checkpoint_minutes)
        self._clock.saved(self.env_steps, time.monotonic())

    @property
    def env_steps(self) -> int:
        return self.algorithm.env_steps

    def run(self) -> None:
        """Raises `KeyboardInterrupt` after Ctrl-C or SIGTERM, with everything saved."""
        next_evaluation = self._next_evaluation()
        with _interrupts(self.algorithm, lambda: self._evaluating), self._showing_status():
            try:
                if self._evaluation_was_interrupted():
                    self._record_evaluation({"time_total_s": self._time_before_s})
                while self.env_steps < self.plan.env_steps:
                    row = self._train()
                    if self.env_steps >= next_evaluation:
                        self._record_evaluation(row)
                        next_evaluation = self._next_evaluation()
                    else:
                        self._append(row)
                        if self._clock.is_due(self.env_steps, time.monotonic()):
                            self._save(is_best=False)
            except KeyboardInterrupt:
                self.status.note("Interrupted: saving the run …")
                self._save(is_best=False)
                self._draw()
                raise

    def close(self) -> None:
        self._trackers.close(finished=self.env_steps >= self.plan.env_steps)
        self.algorithm.stop()

    def _append(self, row: Row) -> None:
        self.directory.metrics.append(row)
        self._trackers.log(row)

    def _next_evaluation(self) -> int:
        """Returns the env steps of the next evaluation, at most the run's."""
        interval = self.plan.eval_interval
        return min((self.env_steps // interval + 1) * interval, self.plan.env_steps)

    def _evaluation_was_interrupted(self) -> bool:
        """Returns whether an evaluation was due before the run was stopped and did not end."""
        evaluated_at = max(
            (at for at, _ in points(self.directory.metrics.rows(), RETURN)), default=0
        )
        interval, end = self.plan.eval_interval, self.plan.env_steps
        at_the_end = self.env_steps >= end and evaluated_at < self.env_steps
        return self.env_steps // interval > evaluated_at // interval or at_the_end

    @contextlib.contextmanager
    def _showing_status(self) -> Iterator[None]:
        best = None if self.best == float("-inf") else self.best
        self.status.start(env_steps_done=self.env_steps, best_return=best)
        try:
            yield
        finally:
            self.status.stop(self.env_steps)

    def _train(self) -> Row:
        """Trains for one iteration, shows it, and returns its metrics row."""
        row = metrics_row(self.algorithm.train(), self._time_before_s)
        shown = self.plan.algorithm.hyperparameters.losses
        losses = {name: number(row, f"learner/{name}") for name in shown}
        self.status.update(
            self.env_steps,
            self.algorithm.updates,
            number(row, "episode_return_mean"),
            {name: value for name, value in losses.items() if value is not None},
        )
        return row

    def _record_evaluation(self, row: Row) -> None:
        is_best = self._evaluate(row)
        self._append(row)
        self._save(is_best=is_best)
        self._draw()

    def _evaluate(self, row: Row) -> bool:
        """Adds an evaluation to `row`; returns whether it is the best so far."""
        self.algorithm.drain()  # the checkpoint is to have the policy that was evaluated
        row |= {"env_steps": self.env_steps, "updates": self.algorithm.updates}
        # An evaluation can take minutes and changes no weights: a signal may end it at once.
        self._evaluating = True
        try:
            episodes = self.algorithm.evaluate()["env_runners"]
        finally:
            self._evaluating = False
        columns = evaluation_columns(episodes)
        row |= columns
        self.last = columns[RETURN]
        is_best = self.last >= self.best
        self.best = max(self.best, self.last)
        self.status.evaluation(
            self.env_steps,
            self.last,
            columns["evaluation/return_std"],
            int(columns["evaluation/episodes"]),
            is_best,
        )
        return is_best

    def _read_history(self) -> None:
        """Reads the best and last evaluation and the time of a run that is resumed."""
        rows = self.directory.metrics.rows()
        self.best = self.directory.best_return()
        returns = [value for _, value in points(rows, RETURN)]
        if returns:
            self.last = returns[-1]
        if rows:
            self._time_before_s = number(rows[-1], "time_total_s") or 0.0

    def _save(self, *, is_best: bool) -> None:
        self.algorithm.drain()  # first, since it adds env steps
        if self.env_steps == self._saved_at and not is_best:
            return
        # A run resumes from `last`, so `best` needs no replay.
        saved = self.directory.commit_checkpoint(
            self.env_steps,
            self.algorithm.write_checkpoint,
            best=self.best if is_best else None,
            prune=self.algorithm.prune,
        )
        self.algorithm.checkpoint_moved(saved)
        self._saved_at = self.env_steps
        self._clock.saved(self.env_steps, time.monotonic())

    def _draw(self) -> None:
        self.directory.metrics.compact()
        plot_learning_curve(
            self.directory.metrics.rows(),
            self.directory.path / "learning_curve.png",
            title=self.plan.title,
        )


def _say_what_has_changed(saved: Metadata, own: Metadata, kind: type[Options]) -> None:
    """Warns of options (of `kind`) that `config.json` has, by hand, other than the checkpoint."""
    now = {"seed": own.seed, **own.hyperparameters}
    before = {"seed": saved.seed, **completed(saved.hyperparameters, kind)}
    changed = [f"{n}={v!r} (was {before.get(n)!r})" for n, v in now.items() if before.get(n) != v]
    if changed:
        logger.warning(
            "The run goes on with options that it was not begun with: %s. "
            "A new seed begins new episodes.",
            ", ".join(changed),
        )


@contextlib.contextmanager
def _interrupts(
    algorithm: BaseAlgorithm, at_once: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Turns SIGINT and SIGTERM in the block into a request to stop after the training step.

    Where `at_once()` is true nothing is being changed, and they raise `KeyboardInterrupt` at once.
    A second signal exits without saving: the algorithm may be half updated.
    """

    def handle(signum: int, frame: FrameType | None) -> None:
        if algorithm.stop_requested:
            logger.warning("Stopped at once, without saving: checkpoints stay as they are.")
            raise SystemExit(130)
        algorithm.stop_requested = True
        if at_once():
            raise KeyboardInterrupt

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class CheckpointClock:
    """Tells when a checkpoint is due between two evaluations: never without an interval.

    Args:
        env_steps: a checkpoint whenever a multiple of these has been passed.
        minutes: the time between two checkpoints.
    """

    env_steps: int | None
    minutes: float | None
    saved_at_env_steps: int = 0
    saved_at_s: float = 0.0

    def saved(self, env_steps: int, now_s: float) -> None:
        """Records that a checkpoint was saved now."""
        self.saved_at_env_steps, self.saved_at_s = env_steps, now_s

    def is_due(self, env_steps: int, now_s: float) -> bool:
        if self.env_steps is not None:
            return env_steps // self.env_steps > self.saved_at_env_steps // self.env_steps
        return self.minutes is not None and now_s - self.saved_at_s >= 60 * self.minutes
