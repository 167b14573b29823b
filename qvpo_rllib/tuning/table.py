"""The trials of a running experiment: a live table on a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from qvpo_rllib.training.learning_curve import short_count
from qvpo_rllib.training.rows import RETURN
from qvpo_rllib.tuning.results import FAILED, FINISHED, RUNNING, STOPPED, Entry

MAX_ROWS = 24
PLAIN_INTERVAL_S = 30.0  # between two plain lines of progress
ORDER = (RUNNING, FAILED, FINISHED, STOPPED)


class TrialTable:
    """Shows the entries of an experiment's trials (`results.Entry`).

    Args:
        title: of the experiment.
        names: the keys of a trial's "config" to show.
        env_steps: of a whole trial.
        num_trials: how many there will be.
        stream: standard output unless given.
    """

    def __init__(
        self,
        title: str,
        names: Sequence[str],
        env_steps: int,
        num_trials: int,
        stream: TextIO | None = None,
    ) -> None:
        self.title, self.names = title, tuple(names)
        self.env_steps, self.num_trials = env_steps, num_trials
        self._stream = sys.stdout if stream is None else stream
        self._shown_s = time.monotonic()
        self._live: Live | None = None
        if self._stream.isatty():
            self._live = Live(console=Console(file=self._stream), auto_refresh=False)

    def start(self, trials: Mapping[str, Entry]) -> None:
        if self._live is not None:
            self._live.start()
            self.refresh(trials)
        else:
            self._line(self.summary(trials))

    def refresh(self, trials: Mapping[str, Entry]) -> None:
        """Draws once a second, or writes a line now and then; to be called often."""
        now = time.monotonic()
        if now - self._shown_s < (1.0 if self._live is not None else PLAIN_INTERVAL_S):
            return
        self._shown_s = now
        if self._live is not None:
            self._live.update(self.table(trials), refresh=True)
        else:
            self._line(self.summary(trials))

    def note(self, trial: Entry) -> None:
        """Writes a plain line for a trial that has started or ended; the table shows it anyway."""
        if self._live is not None:
            return
        parts = [f"{trial['name']}: {trial['status']}"]
        if trial.get("env_steps"):
            parts.append(f"{trial['env_steps']:,} env steps")
        if trial.get(RETURN) is not None:
            parts.append(f"evaluation {trial[RETURN]:.5g}")
        if trial.get("error"):
            parts.append(str(trial["error"]))
        self._line(", ".join(parts))

    def stop(self, trials: Mapping[str, Entry]) -> None:
        if self._live is not None:
            self._live.update(self.table(trials), refresh=True)
            self._live.stop()
        self._line(self.summary(trials))

    def summary(self, trials: Mapping[str, Entry]) -> str:
        """Returns "3 of 12 trials finished, 2 running, 40% of the env steps"."""
        counts = {s: sum(t["status"] == s for t in trials.values()) for s in ORDER}
        steps = sum(
            self.env_steps if t["status"] == STOPPED else t.get("env_steps") or 0
            for t in trials.values()
        )
        parts = [f"{counts[FINISHED]} of {self.num_trials} trials finished"]
        parts += [f"{counts[s]} {s}" for s in ORDER if s != FINISHED and counts[s]]
        share = 100 * steps / max(1, self.env_steps * self.num_trials)
        return ", ".join([*parts, f"{share:.0f}% of the env steps"])

    def table(self, trials: Mapping[str, Entry]) -> Table:
        table = Table(title=f"{self.title}: {self.summary(trials)}", title_justify="left")
        for name in self.names:
            table.add_column(name)
        for name in ("status", "env steps", "evaluation", "steps/s"):
            table.add_column(name, justify="right" if name != "status" else "left")
        rows = sorted(trials.values(), key=lambda t: ORDER.index(t["status"]))
        for trial in rows[:MAX_ROWS]:
            steps, seconds = trial.get("env_steps"), trial.get("time_total_s")
            value = trial.get(RETURN)
            table.add_row(
                *(str(trial["config"][name]) for name in self.names),
                trial["status"],
                short_count(steps) if steps else "-",
                f"{value:.5g}" if value is not None else "-",
                f"{steps / seconds:.3g}" if steps and seconds else "-",
            )
        hidden = len(rows) - MAX_ROWS
        waiting = self.num_trials - len(trials)
        notes = [f"{hidden} more"] if hidden > 0 else []
        notes += [f"{waiting} waiting"] if waiting > 0 else []
        table.caption = ", ".join(notes) or None
        return table

    def _line(self, text: str) -> None:
        print(f"{self.title}: {text}", file=self._stream, flush=True)
