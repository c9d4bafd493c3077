"""Statistics of paired repetitions. scipy and statsmodels do the work; here it is arranged for our questions.

In all functions `a` and `b` hold one number for each repetition, in the same order: `b` of the baseline, `a` of the
method that is compared with it. Intervals are at 95%, tests two-sided.
"""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_confint

ALPHA = 0.05
POWER = 0.8
DRAWS = 1000
MAX_NEEDED = 1_000_000


class Interval(NamedTuple):
    """An estimate with its 95% interval.

    Attributes:
        value: The estimate.
        low: Lower limit.
        high: Upper limit.
    """

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """An effect and its test.

    Attributes:
        effect: Size of the effect with its interval; None where it is not defined.
        p: Two-sided p-value.
    """

    effect: Interval | None
    p: float


class VarianceComparison(NamedTuple):
    """How the variances of two methods compare.

    Attributes:
        ratio: Variance of the baseline over the method's, more than 1 where the method varies less; None where the
            method does not vary.
        f_p: p of the F test, which supposes normal returns and independent samples.
        levene_p: p of Levene's test about the median (Brown–Forsythe), which supposes independent samples.
        paired_p: p of the same for pairs, which supposes neither.
    """

    ratio: Interval | None
    f_p: float
    levene_p: float
    paired_p: float


def mean_interval(x: np.ndarray) -> Interval:
    """Mean with Student's interval; of no width for a single number or constant ones."""
    mean = float(x.mean())
    half = float(stats.sem(x) * stats.t.ppf(1 - ALPHA / 2, len(x) - 1)) if len(x) > 1 else 0.0
    return Interval(mean, mean - half, mean + half)


def risk_interval(worse: np.ndarray) -> Interval:
    """Share of the repetitions that ended worse, with Wilson's interval (1927).

    Args:
        worse: bool `(R,)`.
    """
    low, high = proportion_confint(int(worse.sum()), len(worse), alpha=ALPHA, method="wilson")
    return Interval(float(worse.mean()), float(low), float(high))


def compare_means(a: np.ndarray, b: np.ndarray) -> Comparison:
    """Mean of a − b with the paired t test and its interval."""
    difference = a - b
    if len(a) < 2 or np.ptp(difference) == 0:
        constant = float(difference[0])
        return Comparison(Interval(constant, constant, constant), float(constant == 0))
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(1 - ALPHA)
    return Comparison(Interval(float(difference.mean()), float(interval.low), float(interval.high)), float(test.pvalue))


def variance_tests(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three tests of equal variances, as p-values along the last axis.

    The F test and Levene's about the median (Brown–Forsythe 1974) suppose independent samples. Pairing, of either sign,
    makes them cautious: the ratio of the variances then varies less than they suppose. The third is Levene's idea for
    pairs: a paired t test of the distances from the medians.

    Args:
        a: `(..., R)`, R >= 2, not constant.
        b: `(..., R)`, not constant.

    Returns:
        Two-sided p-values `(...)` of F, Levene's and the paired test.
    """
    ratio, degrees = b.var(axis=-1, ddof=1) / a.var(axis=-1, ddof=1), (b.shape[-1] - 1, a.shape[-1] - 1)
    f_p = 2 * np.minimum(stats.f.cdf(ratio, *degrees), stats.f.sf(ratio, *degrees))
    if a.shape[-1] < 3:
        # Two values are equally far from their median: both would be sure of what they cannot know.
        return np.minimum(f_p, 1.0), np.ones_like(f_p), np.ones_like(f_p)
    levene_p = stats.levene(a, b, center="median", axis=-1).pvalue
    difference = _from_median(b) - _from_median(a)
    paired_p = stats.ttest_1samp(difference, 0, axis=-1).pvalue
    # Distances that do not differ at all have no t.
    return np.minimum(f_p, 1.0), levene_p, np.where((difference == 0).all(-1), 1.0, paired_p)


def _from_median(x: np.ndarray) -> np.ndarray:
    """Distances from the median of the last axis."""
    return np.abs(x - np.median(x, axis=-1, keepdims=True))


def compare_variances(a: np.ndarray, b: np.ndarray, draws: int = DRAWS) -> VarianceComparison:
    """Ratio Var(b) / Var(a) with a bootstrap interval, and three tests.

    The bootstrap draws whole repetitions, so pairs stay together, and takes the percentiles of the logarithm.

    Args:
        a: `(R,)`, R >= 2.
        b: `(R,)`.
        draws: Bootstrap draws.
    """
    var_a, var_b = float(a.var(ddof=1)), float(b.var(ddof=1))
    if var_a == 0 or var_b == 0:
        same = float(var_a == var_b)
        return VarianceComparison(None, same, same, same)
    ratio = var_b / var_a

    def log_ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.log(b.var(axis=axis, ddof=1)) - np.log(a.var(axis=axis, ddof=1))

    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # Of very few repetitions, a draw may be one again and again, without variance: the interval has no end then.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.bootstrap(
            (a, b), log_ratio, paired=True, vectorized=True, n_resamples=draws, method="percentile", rng=0, batch=100
        )
        tests = variance_tests(a, b)
    finite = np.isfinite(found.bootstrap_distribution).all()
    low, high = np.exp(found.confidence_interval).tolist() if finite else (0.0, math.inf)
    return VarianceComparison(Interval(ratio, low, high), *map(float, tests))


def compare_risks(a: np.ndarray, b: np.ndarray) -> Comparison:
    """Risk reduction P(b worse) − P(a worse), with McNemar's exact test.

    The interval is Agresti and Min's (2005) for paired shares: Wald's, with half an observation added to each of the
    four cells. Only the repetitions in which one of the two ended worse and the other did not tell the risks apart.

    Args:
        a: bool `(R,)`, where the method ended worse than the reference.
        b: bool `(R,)`, where the baseline did.
    """
    only_b, only_a, n = int((b & ~a).sum()), int((a & ~b).sum()), len(a)
    table = [[int((a & b).sum()), only_a], [only_b, int((~a & ~b).sum())]]
    more = only_b + 0.5, only_a + 0.5, n + 2
    centre = (more[0] - more[1]) / more[2]
    half = stats.norm.ppf(1 - ALPHA / 2) * math.sqrt(more[0] + more[1] - (more[0] - more[1]) ** 2 / more[2]) / more[2]
    effect = Interval((only_b - only_a) / n, float(centre - half), float(centre + half))
    return Comparison(effect, float(mcnemar(table, exact=True).pvalue) if only_a + only_b else 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's method (1979), which no dependence between them upsets."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]] if len(p_values) else []


def needed_for_variance(a: np.ndarray, b: np.ndarray, alpha: float = ALPHA) -> int | None:
    """Repetitions that show the seen difference in variance with a power of 80%.

    The paired test is a t test of differences between distances from the median, and its power is that one's.

    Args:
        a: `(R,)`.
        b: `(R,)`.
        alpha: Level of the test.

    Returns:
        The number, or None where there is no effect, or one that a million repetitions would not show.
    """
    difference = _from_median(b) - _from_median(a)
    return _needed(difference.mean(), float(difference.std(ddof=1)), alpha)


def needed_for_risk(a: np.ndarray, b: np.ndarray, alpha: float = ALPHA) -> int | None:
    """Repetitions that show the seen risk reduction with a power of 80%, by a test of the mean difference.

    Args:
        a: bool `(R,)`.
        b: bool `(R,)`.
        alpha: Level of the test.

    Returns:
        The number, or None as in `needed_for_variance`.
    """
    difference = b.astype(float) - a.astype(float)
    return _needed(difference.mean(), float(difference.std(ddof=1)), alpha)


def _needed(effect: float, spread: float, alpha: float) -> int | None:
    """The least number with enough power, in the normal approximation (that of t fails for large samples)."""
    test, size = NormalIndPower(), abs(float(effect)) / spread if spread > 0 else 0.0

    def enough(n: int) -> bool:
        return bool(test.power(size, n, alpha, ratio=0) >= POWER)

    # By bisection: `solve_power` gives up on large and on small effects.
    return 2 + bisect.bisect_left(range(2, MAX_NEEDED), True, key=enough) if enough(MAX_NEEDED) else None
