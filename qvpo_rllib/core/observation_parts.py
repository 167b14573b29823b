"""The parts of a Dict or Tuple observation, and the one vector that the networks take of them.

Order and widths are those of `gymnasium.spaces.flatten`; this module does without Gymnasium, as a
server must, and checks what it flattens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_DEPTH = 32  # of Dicts in Dicts
NUMBERS = "biuf"  # kinds of NumPy's dtypes: booleans, integers, floats


@dataclass(frozen=True, kw_only=True)
class Part:
    """A leaf of a Dict or Tuple observation.

    Attributes:
        path: keys from the outside to the inside; a Tuple's are "0", "1", …
        shape: of its value.
        choices: of a Discrete or MultiDiscrete: the number of values of each entry, in row-major
            order. Each entry becomes a one-hot vector. None: numbers, taken as they are.
        first: the smallest value of each entry that has choices.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...] = ()
    choices: tuple[int, ...] | None = None
    first: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.path) <= MAX_DEPTH or any(n < 0 for n in self.shape):
            raise ValueError(f"{self.name!r} has a path or a shape that is not allowed")
        if self.choices is None:
            return
        number = math.prod(self.shape)
        if self.first is None or len(self.first) != number or len(self.choices) != number:
            raise ValueError(f"{self.name!r} needs choices and first for each of {number} entries")
        if any(n < 1 for n in self.choices):
            raise ValueError(f"{self.name!r} has an entry without a choice")

    @property
    def name(self) -> str:
        """Such as "goal", or "arm.joints" of a Dict within a Dict."""
        return ".".join(self.path)

    @property
    def width(self) -> int:
        """Numbers that it takes in the vector."""
        return math.prod(self.shape) if self.choices is None else sum(self.choices)

    def numbers(self, value: Any) -> NDArray[Any]:
        """Returns its numbers in the vector, [width]. Raises `ValueError` for what does not fit."""
        try:
            array = np.asarray(value)
        except ValueError:  # lists of different lengths
            array = np.array(None)
        if array.dtype.kind not in NUMBERS or array.shape != self.shape:
            found = f"shape {list(array.shape)}" if array.dtype.kind in NUMBERS else "no numbers"
            raise ValueError(f"part {self.name!r} has {found}, not shape {list(self.shape)}")
        if self.choices is None:
            return array.reshape(-1)
        assert self.first is not None
        vector, start = np.zeros(self.width), 0
        for entry, number, first in zip(
            array.reshape(-1).tolist(), self.choices, self.first, strict=True
        ):
            if entry not in range(first, first + number):
                raise ValueError(
                    f"part {self.name!r} has the value {entry}, not an integer from {first} to "
                    f"{first + number - 1}"
                )
            vector[start + int(entry) - first] = 1
            start += number
        return vector


# Children by key, or a leaf's part.
_Node = dict[str, Any] | Part


class ObservationParts:
    """The parts in the order of the vector.

    Raises `ValueError` when made of parts that contradict one another.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.size = sum(part.width for part in self.parts)
        self._tree: dict[str, Any] = {}
        for part in self.parts:
            node = self._tree
            for key in part.path[:-1]:
                node = node.setdefault(key, {})
            if not part.path or not isinstance(node, dict) or part.path[-1] in node:
                raise ValueError(f"the part {part.name!r} stands in another one's place")
            node[part.path[-1]] = part

    def flatten(self, observation: Any) -> NDArray[np.float64]:
        """Returns the vector, [size], of a dict or tuple of values, of dicts or of tuples.

        Raises:
            ValueError: a part is missing, unknown or does not fit; the text begins with "part" or
                "it".
        """
        numbers: list[NDArray[Any]] = []
        _collect(self._tree, observation, "", numbers)
        return np.concatenate(numbers).astype(np.float64, copy=False)

    def to_json(self) -> list[dict[str, Any]]:
        """Returns what checkpoints and bundles record: each part's fields, its name and width."""
        return [
            {
                **{n: list(v) if isinstance(v, tuple) else v for n, v in asdict(part).items()},
                "name": part.name,
                "width": part.width,
            }
            for part in self.parts
        ]

    @classmethod
    def from_json(cls, content: Any) -> "ObservationParts":
        """Returns what `to_json` was called on. Raises `ValueError` for anything else."""
        try:
            parts = cls([_part_of(entry) for entry in content])
            if parts.to_json() != content:
                raise ValueError("widths and names do not fit the parts")
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the parts are damaged ({error!r})") from None
        return parts


def _part_of(entry: dict[str, Any]) -> Part:
    choices, first = entry["choices"], entry["first"]
    whole = [entry["shape"], *([] if choices is None else [choices, first])]
    if not all(type(number) is int for numbers in whole for number in numbers):
        raise ValueError("sizes must be integers")
    return Part(
        path=tuple(str(key) for key in entry["path"]),
        shape=tuple(entry["shape"]),
        choices=None if choices is None else tuple(choices),
        first=None if first is None else tuple(first),
    )


def _collect(node: _Node, value: Any, path: str, numbers: list[NDArray[Any]]) -> None:
    """Appends the numbers of all parts at `node`, in their order."""
    if isinstance(node, Part):
        numbers.append(node.numbers(value))
        return
    if isinstance(value, tuple | list):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, Mapping) or value.keys() != node.keys():
        where = f"part {path!r}" if path else "it"
        found = ", ".join(map(repr, value)) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(
            f"{where} must have the parts {', '.join(map(repr, node))}, not {found[:200]}"
        )
    for key, child in node.items():
        _collect(child, value[key], f"{path}.{key}" if path else key, numbers)
