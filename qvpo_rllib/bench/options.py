"""Options that several parts of `qvpo bench` share, and the sort of row that every part yields.

A part is a module of this folder with

    HELP                     its line in `qvpo bench --help`
    COLUMNS                  a row's values that the table shows: key → heading
    add_arguments(parser)    its options
    run(options)             an iterator over its rows

`cli/bench.py` lists the parts. A part imports torch, Ray and Gymnasium within its functions, so
that the help needs none of them, and `learner`, `act` and `replay` need torch and NumPy alone. The
smallest and the largest round of a value stand in its row under the value's key and "_range".
"""

from argparse import ArgumentParser, ArgumentTypeError
from typing import Any

from qvpo_rllib.bench.sizes import SETTINGS, TASKS
from qvpo_rllib.core.options import options_of
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters

ENGINES: tuple[str, ...] = options_of(QVPOHyperparameters)["engine"].metadata["choices"]

Row = dict[str, Any]  # numbers, words and ranges, as JSON takes them


def add_tasks(parser: ArgumentParser, *, threads: int | None = None) -> None:
    """Adds --task, --threads (default `threads`; None: all cores) and --repeats."""
    parser.add_argument(
        "--task",
        nargs="+",
        default=list(TASKS),
        choices=list(TASKS),
        help="observation and action sizes of these tasks (default: all)",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=threads,
        metavar="N",
        help=f"CPU threads (default: {threads or 'all cores'})",
    )
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="default 7")


def add_device(parser: ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")


def add_settings(parser: ArgumentParser) -> None:
    """Adds --setting, of which several may be given."""
    parser.add_argument(
        "--setting",
        nargs="+",
        default=list(SETTINGS),
        choices=list(SETTINGS),
        help="the paper's sizes, or the light preset's (default: both)",
    )


def add_engines(parser: ArgumentParser) -> None:
    """Adds --engine, of which several may be given."""
    parser.add_argument(
        "--engine", nargs="+", default=["auto"], choices=ENGINES, help="default auto"
    )


def add_set(parser: ArgumentParser) -> None:
    """Adds --set, which gives pairs of an option's name and its value's text."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        type=_setting,
        metavar="KEY=VALUE",
        help="an option, such as critic=quantile: adds a row with it to each without; repeatable",
    )


def _setting(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ArgumentTypeError(f"{text} is not allowed: KEY=VALUE, such as critic=quantile")
    return name, value


def add_sampling(parser: ArgumentParser) -> None:
    """Adds --task, --setting and --repeats of the parts that step one task's environments."""
    parser.add_argument("--task", default="hopper", choices=list(TASKS), help="default hopper")
    parser.add_argument(
        "--setting", default="light", choices=list(SETTINGS), help="sizes (default light)"
    )
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="default 3")


def positive(text: str) -> int:
    """Returns the number that an argument says, or raises `ArgumentTypeError` if it is below 1."""
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"{text} is not allowed: 1 or more")
    return number
