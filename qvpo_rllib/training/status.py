"""The live status of a training run: a panel in a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

WARMING_UP = "warming up (random actions)"
PLAIN_INTERVAL_S = 10.0  # shortest time between two plain lines of progress
WINDOW_S = 30.0  # rates are means over so long


class TrainingStatus:
    """Progress, rates, losses and evaluations of one run, as they are reported to it.

    In a terminal: five lines, one of them a bar, stay at the bottom; evaluations and notes scroll
    above. Elsewhere (a file, a pipe): at most one line per `PLAIN_INTERVAL_S`, and always one for
    the start, an evaluation, a note and the end.

    Args:
        total_env_steps: environment steps at which the run ends.
        title: names the run, on every line.
        stream: where to write; standard output unless given.
        clock: seconds since any fixed moment.
    """

    def __init__(
        self,
        total_env_steps: int,
        *,
        title: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total_env_steps < 1:
            raise ValueError(
                f"total_env_steps={total_env_steps} is not allowed: it must be 1 or more."
            )
        self._total = total_env_steps
        self._title = title
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        # (seconds, env_steps, updates) of each report, oldest first. Replaced and never changed,
        # as the terminal's refresh thread reads it at any time.
        self._samples: tuple[tuple[float, int, int], ...] = ()
        self._env_steps = 0
        self._updates = 0
        self._episode_return: float | None = None
        self._losses: dict[str, float] = {}
        self._last_evaluation = ""
        self._best_evaluation = ""
        self._started_s = clock()
        self._last_line_s: float | None = None
        self._running = False
        self._progress = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[steps]}"),
            TextColumn("{task.fields[eta]}"),
            expand=True,
        )
        self._bar = self._progress.add_task("", total=total_env_steps, steps="", eta="")
        self._live: Live | None = None
        if self._stream.isatty():
            self._live = Live(
                console=Console(file=self._stream, highlight=False),
                get_renderable=self._panel,
                refresh_per_second=4,
            )

    def start(self, env_steps_done: int = 0, best_return: float | None = None) -> None:
        """Begins to show.

        Args:
            env_steps_done: environment steps of a run that is resumed.
            best_return: mean return of its best evaluation so far.
        """
        self._running = True
        self._started_s = self._clock()
        self._env_steps = env_steps_done
        if best_return is not None:
            self._best_evaluation = f"best {best_return:.5g}"
        if env_steps_done == 0:
            # A resumed run's number of updates is not known yet, so no rate can start here.
            self._samples = ((self._started_s, 0, 0),)
        if self._live is not None:
            self._live.start()
        else:
            self._write(f"started at {self._steps_text()}")

    def update(
        self,
        env_steps: int,
        updates: int,
        episode_return: float | None,
        losses: Mapping[str, float],
    ) -> None:
        """Reports progress.

        Args:
            env_steps: environment steps since the run began.
            updates: gradient updates since the run began; 0 during the warm-up.
            episode_return: mean return of recent training episodes, if one has ended.
            losses: the values to show, by name ("critic_loss", "actor_loss"), in this order.
        """
        now = self._clock()
        # Steps of the warm-up are many times faster: they would spoil rates and ETA.
        samples = () if updates > 0 and self._updates == 0 else self._samples
        # One report from before the window is kept, as reports may be rare.
        within = [sample for sample in samples if sample[0] > now - WINDOW_S]
        before = samples[: len(samples) - len(within)][-1:]
        self._samples = (*before, *within, (now, env_steps, updates))
        self._env_steps, self._updates = env_steps, updates
        self._episode_return = episode_return
        self._losses = dict(losses)
        due = self._last_line_s is None or now - self._last_line_s >= PLAIN_INTERVAL_S
        if self._live is None and due:
            self._last_line_s = now
            parts = [f"{self._steps_text()} ({self._percent():.0f}%)", *self._progress_parts()]
            self._write(", ".join([*parts, self._eta_text()]))

    def evaluation(
        self, env_steps: int, mean: float, std: float, episodes: int, is_best: bool
    ) -> None:
        """Reports an evaluation: mean and standard deviation of the return over `episodes`."""
        self._last_evaluation = f"evaluation {mean:.5g} +/- {std:.3g}"
        if is_best:
            self._best_evaluation = f"best {mean:.5g} at {env_steps:,}"
        self.note(
            f"evaluation at {env_steps:,} env steps: return {mean:.5g} +/- {std:.3g} "
            f"over {episodes} episodes" + (", the best so far" if is_best else "")
        )

    def note(self, text: str) -> None:
        """Prints a line, above the panel if there is one."""
        if self._live is None:
            self._write(text)
        else:
            self._live.console.print(Text(text))

    def stop(self, env_steps: int | None = None) -> None:
        """Ends the display and leaves its last state on the screen. May be called twice.

        Args:
            env_steps: where the run is, if that is further than the last report.
        """
        if not self._running:
            return
        self._running = False
        self._env_steps = self._env_steps if env_steps is None else env_steps
        if self._live is not None:
            self._live.stop()
            return
        parts = [f"stopped at {self._steps_text()}", f"after {self._elapsed_text()}"]
        self._write(", ".join(filter(None, [*parts, self._best_evaluation])))

    def _rates(self) -> tuple[float, float] | None:
        """Returns (env steps, updates) per second over the window; None while it holds no time."""
        samples = self._samples
        if not samples or samples[-1][0] <= samples[0][0]:
            return None
        seconds, env_steps, updates = (b - a for a, b in zip(samples[0], samples[-1], strict=True))
        return env_steps / seconds, updates / seconds

    def _percent(self) -> float:
        return min(100.0, 100.0 * self._env_steps / self._total)

    def _steps_text(self) -> str:
        return f"{self._env_steps:,}/{self._total:,} env steps"

    def _elapsed_text(self) -> str:
        return _duration(self._clock() - self._started_s)

    def _eta_text(self) -> str:
        rates = self._rates()
        if self._updates == 0 or rates is None or rates[0] <= 0:
            return "ETA -:--:--"
        return f"ETA {_duration(max(0, self._total - self._env_steps) / rates[0])}"

    def _rate_texts(self) -> list[str]:
        rates = self._rates()
        if rates is None:
            return []
        return [f"{rates[0]:.4g} env steps/s", f"{rates[1]:.4g} updates/s"]

    def _loss_texts(self) -> list[str]:
        return [f"{name.replace('_', ' ')} {value:.4g}" for name, value in self._losses.items()]

    def _progress_parts(self) -> list[str]:
        parts = [] if self._updates else [WARMING_UP]
        parts += self._rate_texts()
        if self._episode_return is not None:
            parts.append(f"return {self._episode_return:.5g}")
        return parts + self._loss_texts()

    def _panel(self) -> Group:
        """Returns five rows, each cut to the terminal's width, so that the height is constant."""
        self._progress.update(
            self._bar,
            completed=min(self._env_steps, self._total),
            steps=self._steps_text(),
            eta=self._eta_text(),
        )
        training = (
            "no training episode has ended yet"
            if self._episode_return is None
            else f"training return {self._episode_return:.5g}"
        )
        phase = [] if self._updates else [WARMING_UP]
        evaluations = [self._last_evaluation or "no evaluation yet", self._best_evaluation]
        return Group(
            self._row([self._title, f"running {self._elapsed_text()}", *phase], style="bold"),
            self._progress,
            self._row(self._rate_texts() or ["measuring the speed"]),
            self._row([training, *self._loss_texts()]),
            self._row(evaluations),
        )

    def _row(self, parts: list[str], style: str = "") -> Text:
        text = "   ".join(filter(None, parts))
        return Text(text, style=style, no_wrap=True, overflow="ellipsis")

    def _write(self, text: str) -> None:
        print(f"{self._title}: {text}", file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
