"""A YAML file as plain values, with the line of every key, so that errors can point at it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qvpo_rllib.experiments.spec_reader import KeyPath, SpecError, dotted

Made = TypeVar("Made")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 with 1e-4 as a number, which PyYAML takes for text, and no key given twice."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.lines: dict[KeyPath, int] = {}

    def convert(self, node: yaml.Node, key: KeyPath = ()) -> Any:
        """The value of `node`; `lines` gets the line of every key and list entry in it."""
        self.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(item, (*key, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for name_node, value_node in node.value:
                name = str(self.construct_object(name_node, deep=True))
                place = (*key, name)
                self.lines[place] = name_node.start_mark.line + 1
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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The experiment file {str(path)!r} cannot be read: {error}. Give a YAML file, such as "
            "tune_configs/smoke.yaml."
        ) from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise ValueError(f"The experiment file {str(path)!r} is empty.")
        return make(loader.convert(node))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}, line {line}: this is not YAML: {error.problem}.") from None
    except SpecError as error:
        key = error.key
        while key not in loader.lines:
            key = key[:-1]
        at = f"{path}, line {loader.lines[key]}"
        name = f"{dotted(error.key)}: " if error.key else ""
        raise ValueError(f"{at}: {name}{error.message}") from None
    finally:
        loader.dispose()
