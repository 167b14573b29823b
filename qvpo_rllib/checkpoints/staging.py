"""Replaces a directory's content at once: a crash leaves the old content or the new, never both.

    .saving      what is being written; it is worth nothing until it is renamed to
    .committed   a whole checkpoint; its files then go to their places in the directory

A crash in between leaves `.committed`: readers take it instead of the directory around it
(`committed`), and the next save puts its files into place. Files are linked, so that `.committed`
stays whole to the end.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qvpo_rllib.files import link_or_copy, new_directory

SAVING, COMMITTED, DONE = ".saving", ".committed", ".done"
# Subdirectories whose files come and go: those that the new content lacks are deleted.
CHANGING = ("replay", "environments")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yields an empty directory to fill; its files replace those of `target` at the block's end.

    If the block raises, or the process dies before it has ended, `target` is as it was. Other files
    in `target` are left alone.
    """
    _put_into_place(target)
    with new_directory(target / COMMITTED, target / SAVING) as saving:
        yield saving
    _put_into_place(target)


def committed(directory: Path) -> Path:
    """Returns where the newest whole content of a directory written by `staged` is."""
    newest = directory / COMMITTED
    return newest if newest.is_dir() else directory


def _put_into_place(target: Path) -> None:
    committed, done = target / COMMITTED, target / DONE
    shutil.rmtree(done, ignore_errors=True)
    if not committed.is_dir():
        return
    files = {path.relative_to(committed) for path in committed.rglob("*") if path.is_file()}
    for name in files:
        temporary = target / name.parent / f".{name.name}.tmp"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        link_or_copy(committed / name, temporary)
        os.replace(temporary, target / name)
        # Renaming a link to the same file does nothing and leaves both names.
        temporary.unlink(missing_ok=True)
    for changing in CHANGING:
        for old in (target / changing).glob("*"):
            if old.relative_to(target) not in files:
                old.unlink()
    os.rename(committed, done)
    shutil.rmtree(done)
