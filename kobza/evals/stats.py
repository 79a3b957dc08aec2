"""Intervals: bootstrap of ratios and of means, Wilson's for shares, and whether a measure moves one way. All by SciPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kobza.config import InputError

CONFIDENCE = 0.95
RESAMPLES = 1000
FEWEST_UNITS = 5  # fewer give an interval that says more than they know
MOST_UNITS = 500  # more units than these are joined before resampling: the interval is the same, the work is not


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval (None: too few units to tell) and the number of units behind it."""

    value: float
    low: float | None
    high: float | None
    n: int

    def map(self, f: Callable[[float], float]) -> Estimate:
        """The estimate of a rising function of the number."""
        ends = [None if end is None else f(end) for end in (self.low, self.high)]
        return Estimate(f(self.value), ends[0], ends[1], self.n)


def scipy_stats():
    """scipy.stats, or one line that says how to get it."""
    try:
        from scipy import stats
    except ImportError:
        raise InputError('kobza eval needs SciPy for its intervals: pip install "kobza[eval]"') from None
    return stats


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> Estimate:
    """sum(tops) / sum(bottoms) with a bootstrap over the units, e.g. nats and bytes of each document."""
    top, bottom = np.asarray(tops, float), np.asarray(bottoms, float)
    keep = bottom > 0
    top, bottom, n = top[keep], bottom[keep], int(keep.sum())
    if n == 0:
        return Estimate(float("nan"), None, None, 0)
    value = float(top.sum() / bottom.sum())
    if n < FEWEST_UNITS:
        return Estimate(value, None, None, n)
    if n > MOST_UNITS:
        top, bottom = ([part.sum() for part in np.array_split(x, MOST_UNITS)] for x in (top, bottom))

    def statistic(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.sum(axis) / b.sum(axis)

    return Estimate(value, *_bootstrap((top, bottom), statistic, (True, True)), n)


Sums = tuple[Sequence[float], Sequence[float]]  # tops and bottoms of units


def difference(a: Sums, b: Sums) -> Estimate:
    """ratio(*a) - ratio(*b) of two independent samples of units."""
    value, n = ratio(*a).value - ratio(*b).value, min(len(a[0]), len(b[0]))
    if n < FEWEST_UNITS:
        return Estimate(value, None, None, n)
    (top, bottom), (other_top, other_bottom) = ([np.asarray(part, float) for part in unit] for unit in (a, b))

    def statistic(i: np.ndarray, j: np.ndarray, axis: int = -1) -> np.ndarray:
        return top[i].sum(axis) / bottom[i].sum(axis) - other_top[j].sum(axis) / other_bottom[j].sum(axis)

    return Estimate(value, *_bootstrap((np.arange(len(top)), np.arange(len(other_top))), statistic, (True, False)), n)


def over_units(n: int, statistic: Callable[[np.ndarray], float], resamples: int = 200) -> Estimate:
    """statistic(indices of units) with a bootstrap over the n units; for what is no ratio of sums."""
    value = float(statistic(np.arange(n)))
    if n < FEWEST_UNITS or not np.isfinite(value):
        return Estimate(value, None, None, n)
    return Estimate(value, *_bootstrap((np.arange(n),), statistic, (False, False), resamples), n)


def _bootstrap(
    data: tuple[np.ndarray, ...], statistic: Callable[..., object], how: tuple[bool, bool], resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Ends of the percentile interval. how: whether the statistic takes an axis, and whether the samples go in pairs."""
    result = scipy_stats().bootstrap(
        data,
        statistic,
        n_resamples=resamples,
        batch=200,
        vectorized=how[0],
        paired=how[1],
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def share(hits: int, n: int) -> Estimate:
    """hits / n with Wilson's interval (1927), which holds at 0, at 1 and for few trials. share(8, 10) -> 0.8 [0.49, 0.94]"""
    if n == 0:
        return Estimate(float("nan"), None, None, 0)
    ends = scipy_stats().binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(hits / n, float(ends.low), float(ends.high), n)


@dataclass(frozen=True)
class Trend:
    """How a measure moves over checkpoints: Spearman's rank correlation with the step (1: each better than the one before), the
    steps back, and those of them beyond the intervals of both ends."""

    spearman: float
    backward: int
    beyond_noise: int


def trend(progress: Sequence[Estimate]) -> Trend:
    """The trend of estimates in the order of training, each oriented so that more is better."""
    values = np.array([e.value for e in progress])
    half = np.array([0.0 if e.low is None or e.high is None else (e.high - e.low) / 2 for e in progress])
    drops = values[:-1] - values[1:]
    noise = np.hypot(half[:-1], half[1:])
    flat = len(values) < 2 or np.ptp(values) == 0
    spearman = float("nan") if flat else float(scipy_stats().spearmanr(np.arange(len(values)), values).statistic)
    return Trend(spearman, int((drops > 0).sum()), int((drops > noise).sum()))
