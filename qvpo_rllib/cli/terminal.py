"""What `qvpo` tells a terminal and a shell: texts, a progress line, exit codes (0 is success)."""

import io
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

WIDTH = 100  # of an error's paragraph


def write_anything(stream: TextIO) -> None:
    """Lets `stream` write "?" for what its encoding lacks: no text may end a command."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")


def paragraph(text: str) -> str:
    """Returns `text` in lines, but a `command` in one, so that it can be copied and pasted."""
    text = re.sub("`[^`]*`", lambda command: command[0].replace(" ", "\0"), text)
    lines = textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)
    return lines.replace("\0", " ")


class ProgressLine:
    """A bar on a terminal, and plain lines of what was found; elsewhere the lines alone."""

    def __init__(self, progress: "Progress", bar: "TaskID") -> None:
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
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(unit),
        bars.TimeRemainingColumn(),
    )
    shown = bars.Progress(
        *columns, console=Console(), transient=True, disable=not sys.stdout.isatty()
    )
    with shown:
        yield ProgressLine(shown, shown.add_task("", total=total))
