"""Which setting is better, and how sure that is."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from qvpo_rllib.report.runs import POPULATION, Group
from qvpo_rllib.report.statistics import (
    Estimate,
    estimate,
    improvement,
    least_p_value,
    least_seeds,
    p_value,
)
from qvpo_rllib.report.tables import Table, with_interval
from qvpo_rllib.tuning.results import STOPPED


@dataclass(frozen=True)
class Candidate:
    """A setting (or an algorithm) with its seeds' last returns on every task of the comparison."""

    label: str
    scores: tuple[tuple[float, ...], ...]

    @property
    def estimate(self) -> Estimate:
        return estimate(self.scores)

    @property
    def seeds(self) -> str:
        counts = {len(s) for s in self.scores}
        return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def candidates(groups: Sequence[Group]) -> tuple[list[Candidate], list[str]]:
    """Returns the settings of a stage that can be compared, and why the others cannot.

    A setting is compared if all its planned seeds have ended on every task: a mean over the seeds
    that happen to be there would not be the same comparison.
    """
    tasks = list(dict.fromkeys(group.task for group in groups))
    found: dict[Hashable, dict[str, Group]] = {}
    names: dict[Hashable, str] = {}
    several = len({group.algorithm for group in groups}) > 1
    for group in groups:
        named = several and group.label != group.algorithm
        names[group.key] = f"{group.algorithm}, {group.label}" if named else group.label
        found.setdefault(group.key, {})[group.task] = group
    whole, missing, stopped = [], [], 0
    for key, by_task in found.items():
        ended = all(
            task in by_task and len(by_task[task].complete) == len(by_task[task].runs)
            for task in tasks
        )
        if ended:
            scores = tuple(tuple(by_task[task].last_returns) for task in tasks)
            whole.append(Candidate(names[key], scores))
        elif any(run.status == STOPPED for group in by_task.values() for run in group.runs):
            stopped += 1
        else:
            missing.append(names[key])
    left_out = [f"as seeds are missing: {'; '.join(missing)}"] if missing else []
    left_out += [f"as the search stopped them early: {stopped} settings"] if stopped else []
    return whole, left_out


def against_best(compared: Sequence[Candidate]) -> tuple[Candidate, list[tuple[str, Estimate]]]:
    """Returns the candidate with the highest estimate, and P(it beats another) for each other."""
    best, *others = _ranked(compared)
    return best, [(other.label, improvement(best.scores, other.scores)) for other in others]


def _ranked(compared: Sequence[Candidate]) -> list[Candidate]:
    return sorted(compared, key=lambda c: -c.estimate.value)


def verdict(compared: Sequence[Candidate], left_out: Sequence[str], stage: str) -> str:
    """Returns the answer in words.

    The best beats another if the interval of the probability of improvement is above 0.5 and the
    exact Mann-Whitney test says that they differ. The interval alone would call one of two equal
    settings better in 29 % of cases with two seeds, in 14 % with five. The best is picked by the
    same seeds, so all pairs of settings are counted as comparisons (Bonferroni), not its own alone.
    """
    if stage == POPULATION:
        return (
            "One population: its members copy each other and change their options as they train. "
            "They are no independent runs of a setting, so they are not compared."
        )
    missing = "".join(f" Not compared, {reason}." for reason in left_out)
    if len(compared) < 2:
        return f"There is nothing to compare yet.{missing}"
    best, others = against_best(compared)
    middle = best.estimate
    text = f"Highest: {best.label}, {middle.value:,.1f}"
    if not middle.has_interval:
        return (
            f"{text}, with one seed: a single seed cannot tell a better setting from a lucky one. "
            f"Run more seeds.{missing}"
        )
    text += f" [{middle.low:,.1f}, {middle.high:,.1f}] over {best.seeds} seeds."
    pairs = math.comb(len(compared), 2)
    limit = 0.05 / pairs
    open_, too_few = [], False
    for other, (label, chance) in zip(_ranked(compared)[1:], others, strict=True):
        # A single seed has no interval: its bounds are NaN.
        if not (chance.low > 0.5 and p_value(best.scores, other.scores) < limit):
            open_.append(label)
            scores = zip(best.scores, other.scores, strict=True)
            too_few |= least_p_value([(len(x), len(y)) for x, y in scores]) >= limit
    if len(open_) == len(others):
        text += " These seeds tell no other setting apart from it."
    elif open_:
        text += f" These seeds do not tell apart from it: {'; '.join(open_)}. The others it beats"
    else:
        text += " It beats every other setting"
    if len(open_) < len(others):
        text += " (95 % interval of the probability of improvement above 0.5, and p < 0.05 by the"
        text += " exact Mann-Whitney test"
        text += f", corrected for {pairs} pairs)." if pairs > 1 else ")."
    if too_few:
        text += f" To tell {len(compared)} settings apart takes at least "
        text += f"{least_seeds(limit, len(best.scores))} seeds of each."
    if stage == "search" and len(compared) > 2:
        text += (
            " The highest of several is flattered by having been picked; fresh seeds would tell "
            "its true return."
        )
    return text + missing


def comparison_table(compared: Sequence[Candidate], heading: str) -> Table:
    """Returns the candidates, the best first, with the probability that the best beats each."""
    best, others = against_best(compared)
    chances = [None, *(chance for _, chance in others)]
    rows = []
    for candidate, chance in zip(_ranked(compared), chances, strict=True):
        e = candidate.estimate
        rows.append(
            (
                candidate.label,
                candidate.seeds,
                with_interval(e, ",.1f"),
                with_interval(chance, ".2f") if chance else "–",
            )
        )
    return Table(
        heading,
        "IQM over seeds of the last evaluation (the mean below four seeds), with "
        f"its 95 % bootstrap interval; and the probability that a run of {best.label} "
        "beats a run of the setting (0.5: a draw).",
        ("setting", "seeds", "last return", f"P({best.label} is better)"),
        rows,
    )
