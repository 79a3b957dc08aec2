"""Measured values of arms -> paired differences, their uncertainty, corrected p-values, and a verdict in words.

The unit of evidence is a pair: the same seed under the arm and under the baseline, so that what a seed brings to both (the order
of the data, the first weights) cancels. Smaller values are better. For each comparison:

    difference  mean over pairs of arm - baseline, with a t interval (paired t-test); beside it Wilcoxon's signed ranks, n >= 6
    corrected p Holm's step-down over all comparisons of the design; the verdict goes by it, at `alpha`
    dz          mean difference / SD of the differences (Cohen's, paired), and mean difference / seed-to-seed SD of the baseline
    detectable  the difference that n pairs find with 80% power, at alpha / number of comparisons (Holm's first hurdle)
    seeds       the pairs that a true effect of the observed dz would need for that, where nothing was detected

Tests, power and corrections are SciPy's and statsmodels'. A run that diverged has no value: its pair is left out of the mean
and counted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

POWER = 0.8  # Cohen 1988's convention
WILCOXON_PAIRS = 6  # with fewer the smallest two-sided p, 2 / 2^n, is above 0.05
MOST_SEEDS = 100_000
CONFIDENCE = 0.95
UNITS = {"val_loss": "nats", "val_bpb": "bits per byte"}

Values = Mapping[int, float | None]  # seed -> measured value; None: that run diverged


@dataclass(frozen=True)
class Comparison:
    """An arm beside its baseline. None where the number of pairs does not give the figure."""

    arm: str
    baseline: str
    size: str
    n: int  # pairs in which both runs have a value
    difference: float | None
    low: float | None  # of the 95% interval
    high: float | None
    p: float | None
    p_corrected: float | None
    wilcoxon: float | None
    dz: float | None
    noise: float | None  # seed-to-seed SD of the baseline
    detectable: float | None
    seeds_needed: int | None  # None where detected, or where more than MOST_SEEDS
    diverged: int  # runs of the arm
    baseline_diverged: int
    identical: bool  # every pair the same number to the last digit
    pairs: dict[int, float]  # seed -> difference
    detected: bool = False
    verdict: str = ""

    @property
    def half_width(self) -> float | None:
        """Half the 95% interval."""
        return None if self.high is None or self.low is None else (self.high - self.low) / 2


def extra(needed: str) -> Any:
    """SciPy's or statsmodels' module of that name; one line where the extra is not installed."""
    import importlib

    from kobza.config import InputError

    try:
        return importlib.import_module(needed)
    except ImportError:
        raise InputError(f'{needed.split(".")[0]} is not installed; the lab needs: pip install "kobza[lab]"') from None


# ---- one comparison ------------------------------------------------------------------------------------------------


def compare(arm: str, values: Values, baseline: str, base_values: Values, size: str = "") -> Comparison:
    """The paired comparison of an arm with its baseline, not yet corrected for the others."""
    stats = extra("scipy.stats")
    seeds = [seed for seed in values if values[seed] is not None and base_values.get(seed) is not None]
    pairs = {seed: float(values[seed]) - float(base_values[seed]) for seed in seeds}  # type: ignore[arg-type]
    differences, n = np.array(list(pairs.values())), len(pairs)
    base = [float(v) for v in base_values.values() if v is not None]
    identical = n > 1 and not differences.any()
    mean = low = high = p = wilcoxon = dz = None
    if n:
        mean = float(differences.mean())
    if n > 1 and not identical:
        test = stats.ttest_1samp(differences, 0.0)
        p, interval = float(test.pvalue), test.confidence_interval(CONFIDENCE)
        low, high = float(interval.low), float(interval.high)
        spread = float(differences.std(ddof=1))
        dz = mean / spread if spread else None
    if identical:
        low = high = 0.0
        p = 1.0
    if n >= WILCOXON_PAIRS and not identical:
        wilcoxon = float(stats.wilcoxon(differences).pvalue)
    return Comparison(
        arm=arm,
        baseline=baseline,
        size=size,
        n=n,
        difference=mean,
        low=low,
        high=high,
        p=p,
        p_corrected=None,
        wilcoxon=wilcoxon,
        dz=dz,
        noise=float(np.std(base, ddof=1)) if len(base) > 1 else None,
        detectable=None,
        seeds_needed=None,
        diverged=sum(v is None for v in values.values()),
        baseline_diverged=sum(v is None for v in base_values.values()),
        identical=identical,
        pairs=pairs,
    )


def judge(comparisons: list[Comparison], alpha: float, unit: str, budget: str) -> list[Comparison]:
    """The comparisons of a design, corrected for their number by Holm's method, with power and a verdict each."""
    multipletests = extra("statsmodels.stats.multitest").multipletests
    tested = [c for c in comparisons if c.p is not None]
    corrected = multipletests([c.p for c in tested], alpha, method="holm")[1] if tested else []
    by_id = {id(c): float(p) for c, p in zip(tested, corrected, strict=True)}
    strict = alpha / max(1, len(tested))
    judged = []
    for c in comparisons:
        p = by_id.get(id(c))
        c = replace(c, p_corrected=p, detected=p is not None and p < alpha)
        if c.dz is not None and c.difference is not None:
            spread = abs(c.difference / c.dz)
            c = replace(c, detectable=detectable_effect(c.n, strict) * spread)
        if c.dz is not None and not c.detected:
            c = replace(c, seeds_needed=seeds_needed(c.dz, c.n, strict))
        judged.append(replace(c, verdict=verdict(c, unit, budget)))
    return judged


def verdict(c: Comparison, unit: str, budget: str) -> str:
    """A comparison in words. "helps by 0.031 ± 0.006 nats at equal FLOPs" """
    crashed = c.diverged and f"{c.diverged} of {c.diverged + c.n} runs diverged"
    if c.n < 2 and crashed:
        return f"diverges: {crashed}"
    if c.n < 2 or c.difference is None:
        there = (
            f"{c.baseline_diverged} runs of the baseline diverged"
            if c.baseline_diverged
            else "more runs are to be done"
        )
        return f"not known: {c.n} pair{'s' * (c.n != 1)} of runs, {there}"
    if c.identical:
        words = "no effect: both arms computed the very same numbers"
        return f"{words}; but {crashed}" if crashed else words
    size = f"{abs(c.difference):.3f} ± {c.half_width:.3f} {unit}"
    if c.detected:
        words = f"{'helps' if c.difference < 0 else 'hurts'} by {size} at {budget}"
    else:
        wanted = f"{c.seeds_needed:,} seeds" if c.seeds_needed else f"more than {MOST_SEEDS:,} seeds"
        size = f"{c.difference:+.3f} ± {c.half_width:.3f} {unit}"
        words = f"no difference detectable ({size} at {budget}); {wanted} would be needed"
    return f"{words}; but {crashed}" if crashed else words


# ---- power ---------------------------------------------------------------------------------------------------------


def power_of(dz: float, n: int, alpha: float) -> float:
    """Chance that a paired t-test over n pairs detects an effect of dz: t^2 is noncentral F(1, n - 1, n dz^2). Equal to
    statsmodels' TTestPower, whose noncentral t gives nan at many places with few pairs."""
    special = extra("scipy.special")
    critical = special.stdtrit(n - 1, 1 - alpha / 2)
    return float(1 - special.ncfdtr(1, n - 1, n * dz**2, critical**2))


@functools.cache
def detectable_effect(n: int, alpha: float) -> float:
    """The dz that n pairs detect with 80% power."""
    high = 1.0
    while power_of(high, n, alpha) < POWER:
        high *= 2
    return float(extra("scipy.optimize").brentq(lambda dz: power_of(dz, n, alpha) - POWER, 0.0, high))


def seeds_needed(dz: float, n: int, alpha: float) -> int | None:
    """The fewest pairs above n that detect dz with 80% power; None beyond MOST_SEEDS."""
    high = n + 1
    low = n
    while power_of(dz, high, alpha) < POWER:
        low, high = high, 2 * high
        if low > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power_of(dz, middle, alpha) < POWER else (low, middle)
    return high if high <= MOST_SEEDS else None


# ---- main effects of a grid ----------------------------------------------------------------------------------------


def averaged(cells: list[Values]) -> dict[int, float | None]:
    """The mean over several arms of each seed's value; None where any of them diverged."""
    means: dict[int, float | None] = {}
    for seed in {seed: None for cell in cells for seed in cell}:
        found = [cell.get(seed) for cell in cells]
        missing = any(v is None for v in found)
        means[seed] = None if missing else float(np.mean([v for v in found if v is not None]))
    return means


# ---- trend over sizes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trend:
    """Differences of an arm at several sizes against log10 of the parameters: a line through all pairs."""

    arm: str
    slope: float  # for ten times the parameters
    low: float
    high: float
    p: float
    intercept: float  # at one parameter
    parameters: list[int]
    verdict: str


def trend(arm: str, points: list[tuple[int, float]], alpha: float, unit: str) -> Trend | None:
    """(parameters, difference) of every pair at every size -> the fitted line; None with fewer than two sizes."""
    stats = extra("scipy.stats")
    sizes = sorted({parameters for parameters, _ in points})
    if len(sizes) < 2 or len(points) < 4:
        return None
    x, y = np.log10([p for p, _ in points]), np.array([d for _, d in points])
    fit = stats.linregress(x, y)
    slope, intercept, p = float(fit.slope), float(fit.intercept), float(fit.pvalue)
    half = float(stats.t.isf((1 - CONFIDENCE) / 2, len(points) - 2) * fit.stderr)
    words = trend_words(slope, half, p < alpha, intercept, sizes, unit)
    return Trend(arm, slope, slope - half, slope + half, p, intercept, sizes, words)


def trend_words(slope: float, half: float, sure: bool, intercept: float, sizes: list[int], unit: str) -> str:
    """What a line means for larger models."""
    rate = f"{slope:+.3f} ± {half:.3f} {unit} for ten times the parameters"
    if not sure:
        return f"no change with size detectable ({rate})"
    first, last = (intercept + slope * math.log10(size) for size in (sizes[0], sizes[-1]))
    kind = "gain" if first + last < 0 else "loss"
    moves = "grows" if (first + last) * slope > 0 else "shrinks"
    words = f"the {kind} {moves} with size: {rate}"
    zero = 10 ** (-intercept / slope) if abs(intercept / slope) < 15 else math.inf
    if moves == "shrinks" and first * last > 0 and zero < math.inf:
        words += f"; the line would reach zero at about {engineering(zero)} parameters, a guess beyond {engineering(sizes[-1])}"
    return words


def engineering(number: float) -> str:
    """A count for reading. engineering(1234567) -> "1.23M" """
    number = float(f"{number:.3g}")  # rounded first, or 999,999 would be 1e+03k
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


# ---- A/A -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Control:
    """How often equal arms were called different."""

    tests: int
    pairs: int
    false_positives: int
    rate: float
    low: float  # exact 95% interval (Clopper & Pearson)
    high: float
    redrawn: int
    redrawn_rate: float
    verdict: str


def false_positives(left: np.ndarray, right: np.ndarray, pairs: int, alpha: float, redraws: int = 2000) -> Control:
    """Values of two equal arms (N,), N = tests x pairs -> the share of tests that find a difference.

    The N runs of each arm are cut into disjoint tests, whose count has an exact interval. Since all 2N runs are alike, `redraws`
    further tests draw 2 x pairs of them at random: correlated, so without an interval, but steadier.
    """
    stats = extra("scipy.stats")
    tests = len(left) // pairs
    difference = (left - right)[: tests * pairs].reshape(tests, pairs)
    found = int((stats.ttest_1samp(difference, 0.0, axis=1).pvalue < alpha).sum())
    exact = stats.binomtest(found, tests, alpha)
    interval = exact.proportion_ci(CONFIDENCE, "exact")
    everyone, generator = np.concatenate([left, right]), np.random.default_rng(0)
    order = np.stack([generator.permutation(len(everyone))[: 2 * pairs] for _ in range(redraws)])
    drawn = everyone[order]
    again = float((stats.ttest_1samp(drawn[:, :pairs] - drawn[:, pairs:], 0.0, axis=1).pvalue < alpha).mean())
    near = interval.low <= alpha <= interval.high
    words = (
        f"{found} of {tests} tests of {pairs} pairs called equal arms different: {found / tests:.1%}, 95% interval "
        f"{interval.low:.1%} to {interval.high:.1%}, {'which holds' if near else 'which MISSES'} alpha = {alpha:.0%}; "
        f"{again:.1%} of {redraws:,} tests redrawn from the same {len(everyone)} runs"
    )
    return Control(tests, pairs, found, found / tests, float(interval.low), float(interval.high), redraws, again, words)
