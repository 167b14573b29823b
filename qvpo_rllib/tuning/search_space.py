"""Distributions over an option's values, as an experiment file writes them."""

from collections.abc import Mapping
from dataclasses import dataclass

from ray import tune
from ray.tune.search.sample import Domain

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
