"""What a handful of seeds can say: intervals, paired differences, corrections for many comparisons, and the words for them.

Runs are paired by seed (same data order, same initialisation), so the differences d_i = method_i - baseline_i are what varies.
Five seeds are few: the interval that takes percentiles of resampled means is far too narrow then. The studentised bootstrap
resamples the pivot

    t = (mean - true difference) / standard error

instead, which carries its own scale, so that its quantiles hold for few and for skewed differences. Up to ten pairs every
resample is visited exactly (as multisets with their multinomial weights), so there is no simulation error and nothing to seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

_EXACT_PAIRS = 10  # 92,378 multisets; one more pair would make it 352,716
_RESAMPLES = 20_000
_WIDEST = 2.0  # times Student's quantile

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it.

    Example:
        >>> Interval(mean=1.0, low=0.5, high=1.5).low
        0.5
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """Mean of method - baseline over paired seeds, its interval, and the two-sided p-value of "no difference".

    The interval at level 1 - a leaves out 0 exactly when p < a.

    Example:
        >>> PairedDifference(difference=0.1, low=0.05, high=0.15, p=0.01).p
        0.01
    """

    difference: float
    low: float
    high: float
    p: float


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent values (one per seed).

    Args:
        values: at least one finite number; a single one has the interval (-inf, inf), since it says nothing about its spread.
        level: coverage, between 0 and 1.

    Raises:
        ValueError: no values, a value that is not finite (named by its position), or a level outside (0, 1).

    Example:
        >>> interval = mean_interval([1.0, 2.0, 3.0])
        >>> round(interval.mean, 3), round(interval.low, 3), round(interval.high, 3)
        (2.0, -0.484, 4.484)
    """
    _check_level(level)
    x = _finite("values", values)
    if len(x) == 0:
        raise ValueError("values must hold at least one number, got none")
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half)


def paired_bootstrap(method: Sequence[float], baseline: Sequence[float], *, level: float = 0.95) -> PairedDifference:
    """Studentised bootstrap of the mean difference over paired seeds; deterministic.

    interval = [mean - q_high se, mean - q_low se], where q are the equal-tailed quantiles of t* = (mean* - mean) / se* over
    resamples of the differences. Up to 10 pairs all n^n resamples count; beyond, 20,000 drawn from a fixed generator. A
    resample of one repeated value has se* = 0 and t* = +-inf, which with few or tied pairs would make the interval infinite:
    each quantile is therefore limited to twice Student's. In simulation that leaves the level where it is for 4 pairs and more,
    and lets a difference of many standard errors survive a correction for several comparisons; 2 and 3 pairs nearly always meet
    the limit, and so are very cautious: 5 seeds are the fewest that see much.

    Measured false positives at level 95 %, 2,000 to 6,000 simulated nulls each, this method / percentiles of the resampled mean:
    5 normal differences 5.3 % / 17 %; 5 exponential 7.5 % / 22 %; 5 lognormal 12 % / 28 %; 10 normal 5.6 % / 9.9 %;
    10 exponential 5.9 % / 12 %; 4 normal 5.1 % / 19 %; 3 normal 1 % / 25 %. (Student's t: 5 exponential 11 %, 5 lognormal 18 %.)
    Its price: intervals 1.3 times Student's for 5 normal differences.

    Args:
        method: one figure a seed, at least two.
        baseline: the same seeds of the baseline, in the same order.
        level: coverage, between 0 and 1.

    Returns:
        The difference method - baseline. All differences equal: an interval of width 0, with p = 1 if they are 0, else p = 0.

    Raises:
        ValueError: fewer than two pairs, lengths that differ, a level outside (0, 1), or a figure that is not finite. A
            diverged run has no figure; it is the worst outcome there is: give it one with `fill_diverged` first.

    Example:
        >>> result = paired_bootstrap([0.97, 0.96, 0.98, 0.97, 0.975], [0.95, 0.945, 0.955, 0.95, 0.95])
        >>> round(result.difference, 3), result.low > 0, result.p < 0.05
        (0.021, True, True)

    Source: Efron and Tibshirani 1993, chapter 12 (bootstrap-t); Davison and Hinkley 1997, section 5.2.
    """
    _check_level(level)
    a, b = _finite("method", method), _finite("baseline", baseline)
    if len(a) != len(b):
        raise ValueError(f"method and baseline must be paired, got {len(a)} and {len(b)} figures")
    n = len(a)
    if n < 2:
        raise ValueError(f"a paired difference needs at least 2 seeds, got {n}")
    scale = float(max(np.abs(a).max(), np.abs(b).max())) or 1.0  # figures of size 1, so that no square under- or overflows
    d = a / scale - b / scale
    mean, spread = float(d.mean()), float(d.std(ddof=1))
    if float(np.ptp(d)) <= 1e-12:  # equal up to the rounding of the subtraction
        mean = 0.0 if not d.any() else mean * scale
        return PairedDifference(mean, mean, mean, 1.0 if mean == 0.0 else 0.0)
    pivots, weights = _pivots((d - mean) / spread)
    error = spread / math.sqrt(n)
    tail = (1 - level) / 2
    limit = _WIDEST * float(stats.t.ppf(1 - tail, n - 1))
    high = min(_quantile(pivots, weights, 1 - tail), limit)
    low = max(-_quantile(-pivots[::-1], weights[::-1], 1 - tail), -limit)
    p = _p_value(mean / error, pivots, weights, n)
    return PairedDifference(scale * mean, scale * (mean - high * error), scale * (mean - low * error), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that keep the chance of any false positive over the whole table at the level.

    The k-th smallest of m is multiplied by m - k + 1, never below a smaller one and never above 1.

    Raises:
        ValueError: a p-value outside [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Source: Holm 1979.
    """
    for i, p in enumerate(p_values):
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p_values[{i}] must lie in [0, 1], got {p}")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def fill_diverged(values: Sequence[float | None], among: Sequence[float | None], better: str) -> list[float]:
    """Give diverged runs a figure: the worst finite one in sight, so that diverging never helps and never is infinite.

    Args:
        values: one figure a seed; None, nan or inf marks a run that diverged.
        among: every figure of the table on this metric (of all methods and seeds), where the worst is looked for.
        better: "higher" or "lower".

    Raises:
        ValueError: no finite figure at all, or an unknown direction.

    Example:
        >>> fill_diverged([0.9, None], [0.9, None, 0.8, 0.85], "higher")
        [0.9, 0.8]
    """
    if better not in ("higher", "lower"):
        raise ValueError(f'better must be "higher" or "lower", got {better!r}')
    known = [v for v in (*among, *values) if v is not None and math.isfinite(v)]
    if not known:
        raise ValueError("every run diverged: there is no finite figure to compare")
    worst = min(known) if better == "higher" else max(known)
    return [v if v is not None and math.isfinite(v) else worst for v in values]


def comparison_words(difference: PairedDifference, better: str, p: float | None = None, level: float = 0.95) -> str:
    """The words for a comparison: "better", "worse" or "no detectable difference".

    Args:
        difference: of method - baseline.
        better: "higher" or "lower", the direction of the metric.
        p: corrected p-value, such as Holm's; without it the difference's own.
        level: what counts as detectable is p < 1 - level.

    Raises:
        ValueError: an unknown direction.

    Example:
        >>> gain = PairedDifference(0.1, 0.05, 0.15, p=0.01)
        >>> comparison_words(gain, "higher"), comparison_words(gain, "lower"), comparison_words(gain, "higher", p=0.08)
        ('better', 'worse', 'no detectable difference')
    """
    if better not in ("higher", "lower"):
        raise ValueError(f'better must be "higher" or "lower", got {better!r}')
    if (difference.p if p is None else p) >= 1 - level - 1e-12 or difference.difference == 0:
        return "no detectable difference"
    return "better" if (difference.difference > 0) == (better == "higher") else "worse"


def _finite(name: str, values: Sequence[float]) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"{name} must be a flat sequence of numbers, got shape {x.shape}")
    if not np.isfinite(x).all():
        i = int(np.flatnonzero(~np.isfinite(x))[0])
        raise ValueError(f"{name}[{i}] must be finite, got {x[i]}")
    return x


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")


@lru_cache(maxsize=4)
def _resamples(n: int) -> tuple[Array, Array]:
    """How often each of n pairs occurs in each resample, (R, n), and the probability of each resample, (R,)."""
    if n <= _EXACT_PAIRS:
        chosen = np.array(list(itertools.combinations_with_replacement(range(n), n)))
    else:
        chosen = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    counts = (chosen[:, :, None] == np.arange(n)).sum(1).astype(np.float64)
    if n > _EXACT_PAIRS:
        return counts, np.full(_RESAMPLES, 1 / _RESAMPLES)
    factorials = np.array([math.factorial(k) for k in range(n + 1)], dtype=np.float64)
    return counts, factorials[n] / factorials[counts.astype(np.int64)].prod(1) / float(n) ** n


def _pivots(z: Array) -> tuple[Array, Array]:
    """Sorted t* of every resample of the centred, unit-variance differences z, and their probabilities."""
    n = len(z)
    counts, weights = _resamples(n)
    mean = counts @ z / n
    variance = (counts @ z**2 / n - mean**2).clip(min=0.0)
    mean[np.abs(mean) < 1e-12] = 0.0
    error = np.sqrt(variance / (n - 1))
    flat = error < 1e-7  # one repeated value: what is left of the variance is rounding
    t = np.divide(mean, error, out=np.zeros_like(mean), where=~flat)
    t[flat] = np.where(mean[flat] == 0.0, 0.0, np.copysign(np.inf, mean[flat]))
    order = np.argsort(t, kind="stable")
    return t[order], weights[order]


def _quantile(sorted_values: Array, weights: Array, q: float) -> float:
    """The smallest value v with P(V > v) < 1 - q, so that a value beyond it has an upper tail P(V >= value) < 1 - q."""
    at_most = np.cumsum(weights)
    return float(sorted_values[min(int(np.searchsorted(at_most, q + 1e-12, side="right")), len(sorted_values) - 1)])


def _p_value(t: float, pivots: Array, weights: Array, n: int) -> float:
    """Twice the smaller tail beyond t; what `_WIDEST` limits in the interval, Student's tail at t / _WIDEST limits here."""
    slack = 1e-9 * max(1.0, abs(t))
    upper = min(float(weights[pivots >= t - slack].sum()), float(stats.t.sf(t / _WIDEST, n - 1)) if t > 0 else 1.0)
    lower = min(float(weights[pivots <= t + slack].sum()), float(stats.t.cdf(t / _WIDEST, n - 1)) if t < 0 else 1.0)
    return min(1.0, 2 * min(upper, lower))
