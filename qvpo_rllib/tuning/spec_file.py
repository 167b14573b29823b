"""An experiment file: YAML as checked values, with errors that name file, line and key."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import yaml

from qvpo_rllib.core.options import Range, nearest

KeyPath = tuple[str | int, ...]
MISSING: Any = object()


class SpecError(ValueError):
    """A wrong value in an experiment; `key` is where it stands, as in ("search", "method")."""

    def __init__(self, key: KeyPath, message: str) -> None:
        self.key, self.message = key, message
        super().__init__(f"{dotted(key)}: {message}" if key else message)


class Section:
    """A mapping whose keys are taken one by one; the end of `with` refuses those left over.

    A key that is missing gets its default unchecked; without one it is required.
    """

    def __init__(self, values: object, key: KeyPath = ()) -> None:
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise SpecError(key, f"{values!r} is not allowed: it must be a mapping, `key: value`.")
        self._left = dict(values)
        self._known: list[str] = []
        self.key = key

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        for name in self._left if kind is None else ():
            raise SpecError(
                (*self.key, name),
                f"there is no such key.{nearest(name, self._known)} "
                f"Allowed here: {', '.join(self._known)}.",
            )

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, default: Any = MISSING, allow: Range | None = None) -> Any:
        """Returns a key's value. Raises `SpecError` unless `allow` holds for it."""
        self._known.append(name)
        if name not in self._left:
            if default is MISSING:
                raise SpecError(self.key, f"{name!r} is missing; it is required.")
            return default
        value = self._left.pop(name)
        if allow is not None and not allow.holds(value):
            self.refuse(name, value, f"it must be {allow.text}")
        return value

    def take_all(self) -> dict[str, Any]:
        """Returns whatever is left, for a mapping whose keys are checked elsewhere."""
        taken, self._left = self._left, {}
        return taken

    def section(self, name: str) -> "Section":
        return Section(self.take(name, None), (*self.key, name))

    def integer(self, name: str, default: Any = MISSING, *, least: int = 0) -> Any:
        """Returns an integer (1e6 and 1_000_000 count) of `least` or more, or the default."""
        allow = Range(
            f"an integer of {least} or more",
            lambda v: is_number(v) and float(v).is_integer() and v >= least,
        )
        value = self.take(name, default, allow)
        return value if value is default else int(value)

    def word(self, name: str, default: str, allowed: Iterable[str]) -> str:
        """Returns one of the words that are allowed."""
        value, allowed = self.take(name, default), tuple(allowed)
        if value not in allowed:
            listed = ", ".join(allowed)
            self.refuse(name, value, f"it must be one of {listed}.{nearest(value, allowed)}")
        return str(value)

    def flag(self, name: str, default: bool) -> bool:
        allow = Range("true or false", lambda value: isinstance(value, bool))
        return bool(self.take(name, default, allow))

    def items(self, name: str, default: Any = MISSING) -> list[Any]:
        """Returns a list without repetitions; a single value counts as a list of one."""
        return self.listed(name, self.take(name, default))

    def listed(self, name: str, value: Any) -> list[Any]:
        """Returns what `items` does for a value that has been taken."""
        values = list(value) if isinstance(value, list | tuple) else [value]
        if not values:
            self.refuse(name, value, "it must have at least one entry")
        for number, item in enumerate(values):
            if item in values[:number]:
                raise SpecError((*self.key, name, number), f"{item!r} is listed twice.")
        return values

    def refuse(self, name: str, value: object, allowed: str) -> NoReturn:
        raise SpecError((*self.key, name), f"{value!r} is not allowed: {allowed.rstrip('.')}.")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def dotted(key: KeyPath) -> str:
    """("grid", "k_target", 1) → "grid.k_target[1]"."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


Made = TypeVar("Made")
MAX_BYTES = 2**20  # of a file; the largest here has 3 kB
MAX_VALUES, MAX_NESTING = 10_000, 50  # in it


def _refuse(node: yaml.Node, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 with 1e-4 as a number, which PyYAML takes for text, and no key given twice."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.lines: dict[KeyPath, int] = {}
        self._num_values = 0

    def convert(self, node: yaml.Node, key: KeyPath = ()) -> Any:
        """The value of `node`; `lines` gets the line of every key and list entry in it."""
        self.lines.setdefault(key, node.start_mark.line + 1)
        # A few lines of aliases may stand for gigabytes, or for something without an end.
        self._num_values += 1
        if self._num_values > MAX_VALUES or len(key) > MAX_NESTING:
            _refuse(node, f"more than {MAX_VALUES:,} values or {MAX_NESTING} levels, aliases read")
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(item, (*key, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for name_node, value_node in node.value:
                if not isinstance(name_node, yaml.ScalarNode):
                    _refuse(name_node, "a key must be a word")
                merges = name_node.tag == "tag:yaml.org,2002:merge"
                name = "<<" if merges else str(self.construct_object(name_node, deep=True))
                place = (*key, name)
                self.lines[place] = name_node.start_mark.line + 1
                if merges:
                    raise SpecError(place, "merge keys are not read; write the values out.")
                if name in values:
                    raise SpecError(place, "this key is given twice; keep one.")
                values[name] = self.convert(value_node, place)
            return values
        return self.construct_object(node, deep=True)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path, make: Callable[[Any], Made]) -> Made:
    """`make` of the values in `path`.

    Raises:
        ValueError: no file, no YAML, or a `SpecError` of `make`; names file, line and key.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        loader = _Loader(content.decode("utf-8"))  # which refuses NUL and its like
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"The experiment file {str(path)!r} cannot be read: {error}. Give a YAML file, such as "
            "tune_configs/smoke.yaml."
        ) from None
    try:
        node = loader.get_single_node()
        if node is None:
            raise ValueError(f"The experiment file {str(path)!r} is empty.")
        return make(loader.convert(node))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}, line {line}: this is not YAML: {error.problem}.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: {MAX_NESTING} levels at most.") from None
    except SpecError as error:
        key = error.key
        while key not in loader.lines:
            key = key[:-1]
        at = f"{path}, line {loader.lines[key]}"
        name = f"{dotted(error.key)}: " if error.key else ""
        raise ValueError(f"{at}: {name}{error.message}") from None
    finally:
        loader.dispose()
