"""A progress line for commands that take seconds to minutes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class ProgressLine:
    """A bar on a terminal, and plain lines of what was found; elsewhere the lines alone."""

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        self._progress, self._bar = progress, bar

    def advance(self, done: int, description: str) -> None:
        """Moves the bar to `done`."""
        self._progress.update(self._bar, completed=done, description=description)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        console = self._progress.console
        console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def progress_line(total: int, unit: str) -> Iterator[ProgressLine]:
    """Shows progress of `total` in `unit` (a plural) while the block runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    terminal = sys.stdout.isatty()
    with Progress(*columns, console=Console(), transient=True, disable=not terminal) as progress:
        yield ProgressLine(progress, progress.add_task("", total=total))
