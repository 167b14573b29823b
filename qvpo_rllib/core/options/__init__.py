"""Options of an algorithm as fields of a frozen dataclass: their text, types and allowed values.

A subclass of `Options` declares its fields with `option(...)`, and its presets beside them.
Everything that reads options (RLlib's config, YAML, the command line, the READMEs' tables) asks
here for names and values; `Options.resolve` makes the checked options of a run.
"""

import dataclasses
import difflib
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

OptionValue = bool | int | float | str | Sequence[int] | Sequence[str] | None
Setting = Mapping[str, OptionValue]  # values by option


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
ENTRY_POINTS = Range(
    "a list of 'module:function', such as my_envs:scaled",
    lambda value: all(re.fullmatch(r"[\w.]+:\w+", path) for path in value),
)


def option(
    default: Any,
    meaning: str,
    symbol: str = "",
    *,
    range: Range | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Returns a field of `Options`.

    Its declared type may have words beside a number: `float | Literal["auto"]`.

    Args:
        meaning: its line in the table of a README.
        symbol: the paper's, if it has one.
        range: of a number or a list.
        choices: the words that a text may be.
    """
    metadata = {"meaning": meaning, "symbol": symbol, "range": range, "choices": choices}
    return field(default=default, metadata=metadata)


def with_default(kind: "type[Options]", name: str, default: Any) -> Any:
    """Returns the option `name` of `kind` with another default, for a subclass of `kind`."""
    return field(default=default, metadata=kind.__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class RunDefaults:
    """What a preset says about the run around the algorithm."""

    env: str
    env_steps: int
    eval_interval: int  # env steps
    num_envs: int  # per worker


RUN_DEFAULTS = {
    "quick": RunDefaults("InvertedPendulum-v5", 15_000, 1_000, 4),
    "light": RunDefaults("HalfCheetah-v5", 50_000, 2_500, 4),
    "default": RunDefaults("HalfCheetah-v5", 1_000_000, 10_000, 1),
    "paper": RunDefaults("HalfCheetah-v5", 1_000_000, 10_000, 1),
    "authors": RunDefaults("HalfCheetah-v5", 1_000_000, 10_000, 1),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Immutable and checked when made: `ValueError` names a wrong value and what is allowed.

    Attributes:
        presets: named sets of options.
        runs: by preset: what it says about the run.
        task_values: by a task's name without its version: values of options left at none.
        other_task_values: the same for every other task.
        decays: pairs (end, steps): where option `end` is set, `steps` is the run's env steps unless
            it is given.
        fixed_by_checkpoint: options that a checkpoint's networks or environments depend on:
            another value cannot go on from it.
        losses: learner metrics for the status line.
        smoke: options that make the algorithm tiny.
    """

    presets: ClassVar[Mapping[str, Setting]] = {"default": {}}
    runs: ClassVar[Mapping[str, RunDefaults]] = RUN_DEFAULTS
    task_values: ClassVar[Mapping[str, Setting]] = {}
    other_task_values: ClassVar[Setting] = {}
    decays: ClassVar[tuple[tuple[str, str], ...]] = ()
    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = ()
    losses: ClassVar[tuple[str, ...]] = ("critic_loss", "actor_loss")
    smoke: ClassVar[Setting] = {}

    def __post_init__(self) -> None:
        types = _types(type(self))
        for name, declared in options_of(type(self)).items():
            value = _checked(name, getattr(self, name), types[name], declared.metadata)
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raises `ValueError` where options contradict one another."""

    def require(self, name: str, holds: bool, allowed: str) -> None:
        """Raises `ValueError` naming option, value and what is allowed, unless `holds`."""
        if not holds:
            raise ValueError(
                f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}."
            )

    @classmethod
    def resolve(
        cls,
        preset: str = "default",
        given: Setting | None = None,
        env: str | None = None,
        env_steps: int | None = None,
    ) -> Self:
        """Returns the options of a run: defaults, over them the preset, over both what is given.

        Args:
            preset: a name in `presets`.
            given: text such as "1e-4" and "none" counts as on the command line, except where a
                word is meant.
            env: its task's values replace what is none (`task_values`); without one, none stays.
            env_steps: of the run: what moves over a run (`decays`) moves over all of them, unless
                its steps are given.

        Raises:
            ValueError: a preset or option that does not exist, or a value that is not allowed.
        """
        values, given = {**cls.preset(preset)}, given or {}
        for name, value in given.items():
            check_name(name, cls)
            is_word = bool(options_of(cls)[name].metadata["choices"])
            is_text = isinstance(value, str) and not is_word
            values[name] = parse_option(name, str(value), cls) if is_text else value
        if env_steps is not None:
            for end, steps in cls.decays:
                if values.get(end, getattr(cls, end)) is not None and steps not in given:
                    values[steps] = max(1, env_steps)
        return cls(**values) if env is None else cls.for_task(values, env)

    @classmethod
    def for_task(cls, values: Setting, env: str) -> Self:
        """Returns the options with these values, and `env`'s own where they are none."""
        task = env.rsplit("/", 1)[-1].rsplit("-v", 1)[0]
        own = cls.task_values.get(task, cls.other_task_values)
        left = {n: v for n, v in own.items() if values.get(n, getattr(cls, n)) is None}
        return cls(**{**values, **left})

    @classmethod
    def preset(cls, name: str) -> Setting:
        """Returns the preset's options. Raises `ValueError` if there is no preset of that name."""
        if name not in cls.presets:
            raise ValueError(
                f"{cls.__name__.removesuffix('Hyperparameters')} has no preset {name!r}: it must "
                f"be one of {', '.join(cls.presets)}."
            )
        return cls.presets[name]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> dict[str, Any]:
        """Returns the options as they come back from a JSON file: tuples are lists."""
        return _as_json(self.to_dict())


def options_of(kind: type[Options]) -> Mapping[str, dataclasses.Field[Any]]:
    """Returns the options by name, a class's own ones before those that it inherits."""
    inherited = {
        f.name
        for base in kind.__bases__
        if dataclasses.is_dataclass(base)
        for f in dataclasses.fields(base)
    }
    # Stable: each of the two keeps its order.
    ordered = sorted(dataclasses.fields(kind), key=lambda f: f.name in inherited)
    return {f.name: f for f in ordered}


def defaults_of(kind: type[Options]) -> dict[str, Any]:
    """Returns the default of every option, in the order of the fields."""
    return {f.name: f.default for f in dataclasses.fields(kind)}


def completed(options: Mapping[str, Any], kind: type[Options]) -> dict[str, Any]:
    """Returns `options`, as JSON has them, with the default of each that they lack.

    An earlier version of this package, which did not have an option, did what its default does.
    """
    return {**_as_json(defaults_of(kind)), **_as_json(options)}


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    return {n: list(v) if isinstance(v, tuple) else v for n, v in options.items()}


def check_name(name: str, kind: type[Options]) -> None:
    """Raises `ValueError` that suggests the nearest name if no option is called `name`."""
    names = tuple(options_of(kind))
    if name not in names:
        raise ValueError(
            f"There is no option {name!r}.{nearest(name, names)}"
            f" The options are: {', '.join(names)}."
        )


def parse_option(name: str, text: str, kind: type[Options]) -> OptionValue:
    """Returns the value of an option as written on a command line ("1e-4", "none", "256,256").

    Raises:
        ValueError: no option is called `name`, or the text is not of its type.
    """
    check_name(name, kind)
    declared = _types(kind)[name]
    text = text.strip()
    if declared.optional and text.lower() in ("none", "null"):
        return None
    if text.lower() in declared.words:
        return text.lower()
    try:
        if declared.base is bool:
            return {"true": True, "false": False}[text.lower()]
        if declared.base is int:
            number = float(text)  # so that 1e6 and 1_000_000 are both understood
            if not number.is_integer():
                raise ValueError
            return int(number)
        if declared.base is float:
            return float(text)
        if declared.base is tuple:
            parts = (part.strip() for part in text.strip("[]() ").split(","))
            return tuple(declared.item(part) for part in parts if part)
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{name}={text!r} is not valid: it must be {declared}.") from None
    return text


def option_table(kind: type[Options]) -> str:
    """Returns the options as a Markdown table, for a README."""
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


def require_at_least(option: str, value: int | None, least: int) -> None:
    """Raises `ValueError` that names `option` ("--k") if `value` is given and below `least`."""
    if value is not None and value < least:
        raise ValueError(f"{option} {value} is not allowed: it must be {least} or more.")


def nearest(name: object, names: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" with the nearest of `names`; "" if none is near."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class _Type(NamedTuple):
    """The declared type of an option."""

    base: type
    optional: bool
    item: type  # of a list's parts
    words: tuple[str, ...] = ()  # allowed beside values of `base`

    def __str__(self) -> str:
        names = {
            int: "an integer",
            float: "a finite number",
            bool: "true or false",
            str: "a word",
            tuple: "a list of integers, such as [256, 256]"
            if self.item is int
            else "a list of words",
        }
        return " or ".join([names[self.base], *self.words, *(["none"] if self.optional else [])])


def _types(kind: type[Options]) -> dict[str, _Type]:
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        base, *others = typing.get_args(hint) if is_union else (hint,)
        words = [word for other in others for word in typing.get_args(other)]
        item = next(iter(typing.get_args(base)), base)
        origin, optional = typing.get_origin(base) or base, type(None) in others
        found[name] = _Type(origin, optional, item, tuple(words))
    return found


def _checked(name: str, value: Any, declared: _Type, metadata: Mapping[str, Any]) -> Any:
    """Returns an allowed value as the declared type; a float may be given as an integer.

    Raises:
        ValueError: the value is of another type, or not one that the option may take.
    """
    if (value is None and declared.optional) or value in declared.words:
        return value
    value = _converted(value, declared.base)
    valid = isinstance(value, declared.base) and (declared.base is bool or type(value) is not bool)
    if declared.base is float:
        valid = valid and math.isfinite(value)
    if declared.base is tuple:
        valid = valid and all(type(part) is declared.item for part in value)
    if not valid:
        raise ValueError(f"{name}={value!r} is not valid: it must be {declared}.")
    allowed: Range | None = metadata["range"]
    if allowed is not None and not allowed.holds(value):
        text = ", or ".join([allowed.text, *declared.words, *["none"] * declared.optional])
        raise ValueError(f"{name}={value!r} is not allowed: it must be {text}.")
    choices = metadata["choices"]
    if choices and value not in choices:
        raise ValueError(
            f"{name}={value!r} does not exist: it must be one of {', '.join(choices)}."
            + nearest(value, choices)
        )
    return value


def _converted(value: Any, base: type) -> Any:
    """Returns a number as `base` where nothing is lost, NumPy's included; else the value itself."""
    if base is tuple and isinstance(value, list | tuple):
        return tuple(_converted(part, int) if type(part) is not float else part for part in value)
    if base not in (int, float) or isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    try:
        number = float(value)
    except OverflowError:
        return math.inf if base is float else value
    if base is float:
        return number
    return math.trunc(value) if number.is_integer() else value
