"""The command line. Each command is a module with `add(commands)`; `main` runs them."""

import argparse
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from qvpo_rllib.cli import (
    bench,
    paper,
    play,
    report,
    serve,
    train,
    tune,
)
from qvpo_rllib.cli.terminal import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    paragraph,
    write_anything,
)
from qvpo_rllib.core.errors import ENDS_TRAINING
from qvpo_rllib.files import DISK_ERRORS
from qvpo_rllib.ray_session import RayNotStarted, keep_private

COMMANDS = (train, play, tune, report, serve, paper, bench)


class _Parser(argparse.ArgumentParser):
    """Suggests the nearest option for a misspelt one."""

    def error(self, message: str) -> NoReturn:
        words = message.partition("unrecognized arguments: ")[2].split()
        known = [o for action in self._actions for o in action.option_strings]
        for word in words:
            close = difflib.get_close_matches(word.partition("=")[0], known, n=1)
            if close:
                message += f". Did you mean {close[0]}?"
                break
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\nSee {self.prog} --help.\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qvpo",
        description="Train a diffusion policy by online reinforcement learning: QVPO on Ray RLlib.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if training failed; 2 for bad input; 130 if interrupted."""
    for stream in (sys.stdout, sys.stderr):
        write_anything(stream)
    options, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        _subparser(options).error(f"unrecognized arguments: {' '.join(unknown)}")
    _quiet()
    _import_from_here(options)
    keep_private(getattr(options, "address", None))
    try:
        code: int = options.run(options)
    except ValueError as error:
        return _report(error, EXIT_BAD_INPUT)
    except (*ENDS_TRAINING, RayNotStarted) as error:
        return _report(error, EXIT_FAILED)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return _report(error, EXIT_FAILED)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _import_from_here(options: argparse.Namespace) -> None:
    """Lets modules in the working directory be imported where the user names an environment or
    loads a checkpoint, which runs code anyway: `qvpo` would find none, `python -m` always.

    The environment that a bundle names is no reason to run what lies there; `--import` is one.
    """
    here = os.getcwd()
    sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]
    source = getattr(options, "checkpoint", None)
    is_bundle = source is not None and (source / "policy.json").is_file()
    if options.command != "serve" and (not is_bundle or getattr(options, "modules", None)):
        sys.path.append(here)


def _subparser(options: argparse.Namespace) -> argparse.ArgumentParser:
    """The parser of the command that was given, and of its part where it has parts."""
    parser = build_parser()
    for name in (options.command, getattr(options, "part", None)):
        if name is not None:
            action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
            parser = action.choices[name]
    return parser


def _report(error: Exception, code: int) -> int:
    text = ". ".join([str(error), *getattr(error, "__notes__", [])])
    print(paragraph(f"qvpo: error: {text}"), file=sys.stderr)
    return code


class _ToStderr(logging.Handler):
    """Writes messages as plain text to `sys.stderr`, whatever that is by then."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


TO_STDERR = _ToStderr()
OTHERS_TO_STDERR = _ToStderr(logging.WARNING)
OTHERS_TO_STDERR.addFilter(lambda record: not record.name.startswith("qvpo_rllib"))


def _quiet() -> None:
    """Shows this package's messages on standard error, and hides Ray's.

    RLlib announces on every start that the old API stack will go; the version is capped.
    """
    own = logging.getLogger("qvpo_rllib")
    own.addHandler(TO_STDERR)  # once, however often it is called
    own.setLevel(logging.INFO)
    if not logging.root.handlers:  # dm_control would add one, which repeats this package's messages
        logging.root.addHandler(OTHERS_TO_STDERR)
    # Rollout workers see no GPU: Ray hides it from actors that ask for none if it is told to.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("ray").setLevel(logging.ERROR)
