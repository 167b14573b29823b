"""Options of an algorithm as fields of a frozen dataclass: their text, types and allowed values.

A subclass of `Options` declares its fields with `option(...)`. Everything that reads options
(RLlib's config, YAML, the command line, the README's table) asks here for names and values.
"""

import dataclasses
import difflib
import math
import numbers
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self


class Range(NamedTuple):
    """The numbers that an option may take."""

    text: str
    holds: Callable[[Any], bool]


COUNT = Range("an integer of 1 or more", lambda value: value >= 1)
NON_NEGATIVE_COUNT = Range("an integer of 0 or more", lambda value: value >= 0)
POSITIVE = Range("a number above 0", lambda value: value > 0)
NON_NEGATIVE = Range("a number of 0 or more", lambda value: value >= 0)
SHARE = Range("a number in (0, 1]", lambda value: 0 < value <= 1)
BELOW_ONE = Range("a number in [0, 1)", lambda value: 0 <= value < 1)
WIDTHS = Range(
    "a list of at least one width of 1 or more, such as [256, 256]",
    lambda value: len(value) >= 1 and all(width >= 1 for width in value),
)


def option(
    default: Any,
    meaning: str,
    symbol: str = "",
    *,
    range: Range | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of `Options`.

    Args:
        meaning: its line in the table of a README.
        symbol: the paper's, if it has one.
        range: of a number or a list.
        choices: the words that a text may be.
    """
    metadata = {"meaning": meaning, "symbol": symbol, "range": range, "choices": choices}
    return field(default=default, metadata=metadata)


def with_default(kind: "type[Options]", name: str, default: Any) -> Any:
    """The option `name` of `kind`, for a subclass in which only its default is another one."""
    return field(default=default, metadata=kind.__dataclass_fields__[name].metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Immutable and checked when made: `ValueError` names a wrong value and what is allowed.

    Attributes:
        task_values: by a task's name without its version: values of options left at none.
        other_task_values: the same for every other task.
    """

    task_values: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    other_task_values: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        options, types = options_of(type(self)), _types(type(self))
        for name in options:
            value = getattr(self, name)
            value = tuple(value) if isinstance(value, list) else value
            object.__setattr__(self, name, _checked_type(name, value, types[name]))
        for name, declared in options.items():
            _check_value(name, getattr(self, name), declared, types[name])
        self.check()

    def check(self) -> None:
        """Raises `ValueError` where options contradict one another."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def values_for_task(self, env_id: str) -> dict[str, Any]:
        """The options that are left to the task ("none") and their values for `env_id`."""
        task = env_id.rsplit("/", 1)[-1].rsplit("-v", 1)[0]
        values = self.task_values.get(task, self.other_task_values)
        return {name: value for name, value in values.items() if getattr(self, name) is None}

    def resolved_for(self, env_id: str) -> Self:
        """With `values_for_task` filled in."""
        return dataclasses.replace(self, **self.values_for_task(env_id))


def options_of(kind: type[Options]) -> dict[str, dataclasses.Field[Any]]:
    """The options by name, a class's own ones before those that it inherits."""
    inherited = {
        f.name
        for base in kind.__bases__
        if dataclasses.is_dataclass(base)
        for f in dataclasses.fields(base)
    }
    options = {f.name: f for f in dataclasses.fields(kind)}
    own = [name for name in options if name not in inherited]
    return {name: options[name] for name in [*own, *(n for n in options if n in inherited)]}


def check_name(name: str, kind: type[Options]) -> None:
    """Raises `ValueError` that suggests the nearest name if no option is called `name`."""
    names = tuple(options_of(kind))
    if name not in names:
        raise ValueError(
            f"There is no option {name!r}.{_nearest(name, names)}"
            f" The options are: {', '.join(names)}."
        )


def parse_option(name: str, text: str, kind: type[Options]) -> Any:
    """The value of option `name` as written on a command line ("1e-4", "none", "256,256")."""
    check_name(name, kind)
    declared = _types(kind)[name]
    text = text.strip()
    if _optional(declared) and text.lower() in ("none", "null"):
        return None
    base = _base(declared)
    try:
        if base is bool:
            return {"true": True, "false": False}[text.lower()]
        if base is int:
            number = float(text)  # so that 1e6 and 1_000_000 are both understood
            if not number.is_integer():
                raise ValueError
            return int(number)
        if base is float:
            return float(text)
        if base is tuple:
            return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())
    except (ValueError, KeyError, OverflowError):
        raise ValueError(
            f"{name}={text!r} is not valid: it must be {_describe(declared)}."
        ) from None
    return text


def option_table(kind: type[Options]) -> str:
    """The options as a Markdown table, for the README."""
    rows = ["| option | symbol | default | meaning |", "|---|---|---|---|"]
    for name, declared in options_of(kind).items():
        default = declared.default
        default = list(default) if isinstance(default, tuple) else default
        shown = "none" if default is None else str(default).lower()
        meaning, symbol = declared.metadata["meaning"], declared.metadata["symbol"]
        choices = declared.metadata["choices"]
        listed = f" ({', '.join(choices)})" if choices else ""
        rows.append(f"| `{name}` | {symbol} | `{shown}` | {meaning}{listed} |")
    return "\n".join(rows)


def require(name: str, value: Any, holds: bool, allowed: str) -> None:
    """Raises `ValueError` naming option, value and what is allowed, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}.")


def _check_value(name: str, value: Any, declared: dataclasses.Field[Any], kind: Any) -> None:
    if value is None:
        return
    allowed: Range | None = declared.metadata["range"]
    if allowed is not None:
        text = allowed.text + (", or none" if _optional(kind) else "")
        require(name, value, allowed.holds(value), text)
    choices = declared.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(
            f"{name}={value!r} does not exist: it must be one of {', '.join(choices)}."
            + _nearest(value, choices)
        )


def _types(kind: type[Options]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _optional(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def _base(kind: Any) -> Any:
    if _optional(kind):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return typing.get_origin(kind) or kind


def _describe(kind: Any) -> str:
    words = {
        int: "an integer",
        float: "a finite number",
        bool: "true or false",
        str: "a word",
        tuple: "a list of integers, such as [256, 256]",
    }[_base(kind)]
    return words + (" or none" if _optional(kind) else "")


def _checked_type(name: str, value: Any, kind: Any) -> Any:
    """`value` as the declared type (an integer is accepted for a float), or `ValueError`."""
    base = _base(kind)
    if value is None and _optional(kind):
        return None
    if not isinstance(value, bool):  # NumPy's numbers are as good as Python's
        if base is float and isinstance(value, numbers.Real):
            try:
                value = float(value)
            except OverflowError:
                value = math.inf
        if base is int and (
            isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())
        ):
            value = int(value)
    valid = isinstance(value, base) and (base is bool or not isinstance(value, bool))
    if valid and base is float:
        valid = math.isfinite(value)
    if valid and base is tuple:
        valid = all(isinstance(p, numbers.Integral) and not isinstance(p, bool) for p in value)
        value = tuple(int(part) for part in value) if valid else value
    if not valid:
        raise ValueError(f"{name}={value!r} is not valid: it must be {_describe(kind)}.")
    return value


def _nearest(name: Any, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def require_at_least(option: str, value: int | None, least: int) -> None:
    """Raises `ValueError` that names `option` ("--k") if `value` is given and below `least`."""
    if value is not None and value < least:
        raise ValueError(f"{option} {value} is not allowed: it must be {least} or more.")
