"""Distributions over an option's values, as an experiment file writes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.search.sample import Categorical, Domain

from qvpo_rllib.core.options import OptionValue
from qvpo_rllib.tuning.spec_file import KeyPath, Section, SpecError

KINDS = ("choice", "uniform", "loguniform", "integers")


@dataclass(frozen=True)
class Distribution:
    """`choice` of values, or `uniform`, `loguniform`, `integers` between two bounds, inclusive."""

    kind: str
    values: tuple[OptionValue, ...]

    def domain(self) -> Domain:
        """Returns Ray Tune's distribution."""
        if self.kind == "choice":
            return tune.choice(list(self.values))
        low, high = (value for value in self.values if isinstance(value, int | float))
        if self.kind == "integers":
            return tune.randint(low, high + 1)
        return (tune.uniform if self.kind == "uniform" else tune.loguniform)(low, high)

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.values))})"


class Planned(Categorical):  # type: ignore[misc]
    """A choice of which Ray Tune is told the value in every trial (`points_to_evaluate`).

    Tune takes a list apart and puts its elements into the distribution one by one, which fails with
    its own `choice`. Here they become the list again; Tune copies the distribution for each trial.
    """

    def __init__(self, categories: Sequence[OptionValue]) -> None:
        super().__init__(categories)
        self._elements: list[int] = []

    def __getitem__(self, index: int) -> None:
        """Returns nothing to compare an element with."""

    def __setitem__(self, index: int, element: int) -> None:
        self._elements.insert(index, element)

    def sample(self, *arguments: Any, **options: Any) -> list[int]:
        """Is called only where no value stands in this object's place: for lists."""
        return list(self._elements)


def parse_space(section: Section) -> dict[str, Distribution]:
    """Returns a distribution for each option; a list stands for a choice."""
    return {name: _parse(value, (*section.key, name)) for name, value in section.take_all().items()}


def _parse(value: object, key: KeyPath) -> Distribution:
    if isinstance(value, list | tuple):
        value = {"choice": value}
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in KINDS:
        raise SpecError(
            key,
            f"{value!r} is not allowed: it must be a list of values, or one of choice, uniform, "
            "loguniform and integers, such as {loguniform: [1e-3, 1e-1]}.",
        )
    kind, values = next(iter(value.items()))
    values = tuple(values) if isinstance(values, list | tuple) else (values,)
    if kind == "choice":
        if len(values) < 2:
            raise SpecError(key, f"{values!r} is not allowed: a choice has two values or more.")
        return Distribution(kind, values)
    kinds: tuple[type, ...] = (int,) if kind == "integers" else (int, float)
    if len(values) != 2 or not all(type(v) in kinds for v in values) or values[0] >= values[1]:
        raise SpecError(
            key, f"{list(values)} is not allowed: {kind} takes [low, high], low < high."
        )
    if kind == "loguniform" and values[0] <= 0:
        raise SpecError(key, f"{list(values)} is not allowed: loguniform needs bounds above 0.")
    return Distribution(kind, values)
