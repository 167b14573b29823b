"""Statistics over seeds, after Agarwal et al., "Deep RL at the Edge of the Statistical Precipice".

Seeds are the samples. With several tasks the bootstrap is stratified: each task's seeds are drawn
anew among themselves.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with the bounds of its 95 % interval; the bounds are NaN if it has none."""

    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


def iqm(values: Any, axis: int = -1) -> Any:
    """Returns the interquartile mean: the mean without the lowest and the highest quarter.

    Fewer than four values have no quarter: the mean of all is returned.
    """
    return stats.trim_mean(values, 0.25, axis=axis)


def common_points(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[Array, Array]:
    """Returns where all curves have a point: mean env steps [points], values [curves, points].

    Points of two curves are the same one if each is the other's nearest, and less than a quarter of
    an interval away: vector environments take a few env steps more or less between two evaluations.

    Args:
        curves: each (env steps, value) by rising env steps; none is empty.
    """
    steps = [np.array(list(dict(curve))) for curve in curves]
    shortest = min(steps, key=len)
    places = np.array([_nearest(shortest, other) for other in steps])  # [curves, points]
    matched = np.ones(len(shortest), bool)
    for other, place in zip(steps, places, strict=True):
        least_interval = min(np.median(np.diff(s, prepend=0)) for s in (shortest, other))
        matched &= np.abs(other[place] - shortest) < max(1, least_interval / 4)
        matched &= _nearest(other, shortest)[place] == np.arange(len(shortest))
    places = places[:, matched]
    values = [np.array(list(dict(curve).values())) for curve in curves]
    found = np.array([s[place] for s, place in zip(steps, places, strict=True)])
    return found.mean(0), np.array([v[place] for v, place in zip(values, places, strict=True)])


def _nearest(these: NDArray[Any], others: NDArray[Any]) -> NDArray[np.intp]:
    """Returns the index of the nearest of `others` for each of `these`."""
    return np.asarray(np.abs(these[:, None] - others).argmin(1))


def curve_band(returns: Array, statistic: Callable[..., Any] = iqm) -> tuple[Array, Array, Array]:
    """Computes the statistic and its 95 % interval over seeds at every evaluation.

    Args:
        returns: [seeds, evaluations].

    Returns:
        Three arrays [evaluations]; the bounds are NaN for fewer than two seeds.
    """
    centre = np.asarray(statistic(returns, axis=0), dtype=np.float64)
    if returns.shape[0] < 2:
        return centre, np.full_like(centre, np.nan), np.full_like(centre, np.nan)
    interval = _bootstrap((returns,), statistic, axis=0)
    return centre, np.asarray(interval.low), np.asarray(interval.high)


def estimate(samples: Sequence[Sequence[float]], statistic: Callable[..., Any] = iqm) -> Estimate:
    """Returns the mean over tasks of the statistic over seeds, with a stratified interval.

    Args:
        samples: for each task its seeds' scores; one task is one stratum.
    """

    def mean_over_tasks(*strata: Array, axis: int = -1) -> Any:
        return np.mean([statistic(s, axis=axis) for s in strata], axis=0)

    return _estimate(samples, mean_over_tasks)


def improvement(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Estimate:
    """Returns P(a run of `first` beats a run of `second`), ties counting half; mean over tasks.

    Args:
        first, second: for each task the seeds' scores, tasks in the same order.
    """

    def probability(*strata: Array, axis: int = -1) -> Any:
        pairs = zip(strata[: len(first)], strata[len(first) :], strict=True)
        return np.mean([_share_won(x, y) for x, y in pairs], axis=0)

    return _estimate([*first, *second], probability)


def p_value(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Returns the p-value of the exact Mann-Whitney test that the first is better, doubled, since
    it was not known before which would be. Those of several tasks are combined (Stouffer).

    The interval of `improvement` is too narrow for few seeds: where all of one are above all of
    the other, no resample differs, and it is [1, 1] already for two against two.

    Args:
        first, second: as in `improvement`.
    """
    pairs = zip(first, second, strict=True)
    test = functools.partial(stats.mannwhitneyu, alternative="greater", method="exact")
    return _two_sided([float(test(x, y).pvalue) for x, y in pairs])


def least_p_value(sizes: Sequence[tuple[int, int]]) -> float:
    """Returns the p-value of so many seeds on each task that are all above so many others."""
    return _two_sided([1 / math.comb(first + second, first) for first, second in sizes])


def least_seeds(p: float, num_tasks: int) -> int:
    """Returns how many seeds each of two settings must have for a p-value below `p`."""
    return next(n for n in itertools.count(2) if least_p_value([(n, n)] * num_tasks) < p)


def _two_sided(greater: Sequence[float]) -> float:
    return min(1.0, 2 * float(stats.combine_pvalues(greater, method="stouffer").pvalue))


def _estimate(samples: Sequence[Sequence[float]], statistic: Callable[..., Any]) -> Estimate:
    """Returns the statistic of the strata; it has an interval if each has at least two samples."""
    strata = [np.asarray(s, dtype=np.float64) for s in samples]
    value = float(statistic(*strata))
    if any(s.size < 2 for s in strata):
        return Estimate(value, np.nan, np.nan)
    interval = _bootstrap(strata, statistic)
    return Estimate(value, float(interval.low), float(interval.high))


def profile(scores: Sequence[Sequence[float]], thresholds: Array) -> Array:
    """Computes a performance profile: the share of runs above each threshold, mean over tasks.

    Args:
        scores: for each task its seeds' normalised scores.
        thresholds: [thresholds].

    Returns:
        [thresholds] in [0, 1].
    """
    shares = [(np.asarray(s)[:, None] > thresholds).mean(axis=0) for s in scores]
    return np.asarray(np.mean(shares, axis=0))


def _share_won(x: Array, y: Array) -> Any:
    """Returns the share of pairs with x > y; […, n], […, m] → […]."""
    difference = x[..., :, None] - y[..., None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-2, -1))


def _bootstrap(samples: Sequence[Array], statistic: Callable[..., Any], axis: int = -1) -> Any:
    return stats.bootstrap(
        tuple(samples),
        statistic,
        axis=axis,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        vectorized=True,
        method="percentile",  # BCa breaks down when seeds tie, as at a task's highest return
        rng=np.random.default_rng(0),
    ).confidence_interval
