"""Oracles of the statistics: published numbers, brute force over every resample, symmetries, the level measured by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from gradwise.bench import statistics
from gradwise.bench.statistics import PairedDifference, comparison_words, fill_diverged, holm, mean_interval, paired_bootstrap

STUDENT_SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]  # extra hours of sleep; Student 1908

figures = st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: round(x, 6))
pairs = st.integers(2, 7).flatmap(lambda n: st.tuples(*[st.lists(figures, min_size=n, max_size=n)] * 2))


def test_mean_interval_gives_students_own_numbers():
    interval = mean_interval(STUDENT_SLEEP)
    assert interval.mean == pytest.approx(1.58)
    assert (interval.low, interval.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-7)


def test_mean_interval_of_one_value_knows_nothing_of_its_spread():
    assert mean_interval([3.0]) == statistics.Interval(3.0, -math.inf, math.inf)


def test_holm_gives_the_numbers_of_r():
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_monotone_and_between_the_p_value_and_bonferroni(p):
    adjusted = holm(p)
    for (a, x), (b, y) in itertools.pairwise(sorted(zip(p, adjusted, strict=True))):
        assert a <= b
        assert x <= y
    assert all(x >= raw and x <= min(1.0, len(p) * raw) for raw, x in zip(p, adjusted, strict=True))


def brute_force(d, level):
    """Bootstrap-t over all n^n resamples, as the textbook says; each quantile leaves less than the tail beyond it."""
    n, mean, sd = len(d), np.mean(d), np.std(d, ddof=1)
    pivots = []
    for resample in itertools.product(d, repeat=n):
        difference, error = np.mean(resample) - mean, np.std(resample, ddof=1) / math.sqrt(n)
        difference = 0.0 if abs(difference) < 1e-12 * sd else difference
        pivots.append(difference / error if error > 1e-7 * sd else math.copysign(math.inf, difference) if difference else 0.0)
    pivots, count = np.sort(pivots), n**n
    allowed = math.floor((1 - level) / 2 * count + 1e-9)  # resamples that may lie beyond the quantile
    limit = 2 * stats.t.ppf((1 + level) / 2, n - 1)
    high, low = min(pivots[count - 1 - allowed], limit), max(pivots[allowed], -limit)
    error = sd / math.sqrt(n)
    return mean, mean - high * error, mean - low * error


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("n", [3, 4, 5])
def test_multisets_with_weights_are_all_n_to_the_n_resamples(n, level):
    d = np.random.default_rng(n).gumbel(size=n)
    got = paired_bootstrap(d, np.zeros(n), level=level)
    assert (got.difference, got.low, got.high) == pytest.approx(brute_force(d, level), rel=1e-9)


def test_ties_and_repeated_values_agree_with_brute_force():
    d = np.array([0.0, 0.0, 0.0, 0.01, 0.02])
    got = paired_bootstrap(d, np.zeros(5))
    assert (got.low, got.high) == pytest.approx(brute_force(d, 0.95)[1:], rel=1e-9)
    assert math.isfinite(got.high)


def test_drawn_resamples_agree_with_the_exact_ones(monkeypatch):
    d = np.random.default_rng(3).normal(0.3, 1.0, size=8)
    exact = paired_bootstrap(d, np.zeros(8))
    monkeypatch.setattr(statistics, "_EXACT_PAIRS", 2)
    statistics._resamples.cache_clear()
    drawn = paired_bootstrap(d, np.zeros(8))
    statistics._resamples.cache_clear()
    assert (drawn.low, drawn.high, drawn.p) == pytest.approx((exact.low, exact.high, exact.p), rel=0.06)
    assert (drawn.low, drawn.p) != (exact.low, exact.p)


@pytest.mark.parametrize(
    ("n", "draw", "trials", "bounds"),
    [
        (5, lambda rng, n: rng.standard_normal(n), 1500, (0.02, 0.065)),
        (5, lambda rng, n: rng.exponential(size=n) - 1, 1500, (0.02, 0.1)),
        (10, lambda rng, n: rng.standard_normal(n), 250, (0.01, 0.085)),
        (3, lambda rng, n: rng.standard_normal(n), 1000, (0.0, 0.05)),
    ],
    ids=["5 normal", "5 exponential", "10 normal", "3 normal"],
)
def test_false_positives_stay_near_the_level(n, draw, trials, bounds):
    rng = np.random.default_rng(0)
    wrong = sum(paired_bootstrap(draw(rng, n), np.zeros(n)).p < 0.05 for _ in range(trials))
    assert bounds[0] <= wrong / trials <= bounds[1]


def test_a_large_effect_is_seen_with_five_seeds():
    result = paired_bootstrap([0.97, 0.965, 0.972, 0.968, 0.971], [0.95, 0.948, 0.949, 0.951, 0.947])
    assert result.low > 0
    assert result.p < 0.05 / 5  # so that Holm over five comparisons can still see it


def test_identical_pairs():
    assert paired_bootstrap([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]) == PairedDifference(0.0, 0.0, 0.0, 1.0)
    assert paired_bootstrap([0.0, 0.0], [0.0, 0.0]).p == 1.0


def test_equal_differences_have_no_width():
    result = paired_bootstrap([4.1, 4.2, 4.3], [8.1, 8.2, 8.3])
    assert result.low == result.high == result.difference == pytest.approx(-4.0)
    assert result.p == 0.0


@given(pairs, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
@settings(max_examples=150, deadline=None)
def test_the_interval_leaves_out_zero_exactly_when_p_is_below_one_minus_level(both, level):
    result = paired_bootstrap(*both, level=level)
    assume(abs(result.p - (1 - level)) > 1e-6)
    assert result.low <= result.difference <= result.high or result.p == 0
    assert all(map(math.isfinite, (result.difference, result.low, result.high, result.p)))
    if min(abs(result.low), abs(result.high)) > 1e-9:
        assert (result.low > 0 or result.high < 0) == (result.p < 1 - level)


@given(pairs)
@settings(max_examples=80, deadline=None)
def test_swapping_method_and_baseline_mirrors_the_result(both):
    a, b = both
    forth, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    scale = max(1.0, *map(abs, a + b))
    assert (back.difference, back.low, back.high) == pytest.approx((-forth.difference, -forth.high, -forth.low), abs=1e-6 * scale)
    assert back.p == pytest.approx(forth.p, abs=1e-6)


@given(pairs, st.sampled_from([1e-150, 1e-3, 1e150]))
@settings(max_examples=80, deadline=None)
def test_units_do_not_matter(both, unit):
    a, b = both
    one, other = paired_bootstrap(a, b), paired_bootstrap([unit * x for x in a], [unit * x for x in b])
    scale = unit * max(1.0, *map(abs, a + b))
    assert (other.low / scale, other.high / scale) == pytest.approx((one.low * unit / scale, one.high * unit / scale), abs=1e-6)
    assert other.p == pytest.approx(one.p, abs=1e-6)


def test_the_order_of_the_pairs_does_not_matter_and_the_result_repeats():
    a, b = [0.9, 0.8, 0.95, 0.7, 0.85], [0.85, 0.82, 0.9, 0.65, 0.8]
    one, other = paired_bootstrap(a, b), paired_bootstrap(a[::-1], b[::-1])
    assert (one.low, one.high, one.p) == pytest.approx((other.low, other.high, other.p))
    many = list(np.random.default_rng(0).normal(size=15))
    assert paired_bootstrap(many, [0.0] * 15) == paired_bootstrap(many, [0.0] * 15)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: paired_bootstrap([1.0], [2.0]), "at least 2 seeds, got 1"),
        (lambda: paired_bootstrap([1.0, 2.0], [2.0]), "paired, got 2 and 1"),
        (lambda: paired_bootstrap([1.0, math.nan], [2.0, 1.0]), r"method\[1\] must be finite, got nan"),
        (lambda: paired_bootstrap([1.0, 2.0], [math.inf, 1.0]), r"baseline\[0\] must be finite, got inf"),
        (lambda: paired_bootstrap([1.0, 2.0], [2.0, 1.0], level=1.0), "level must lie between 0 and 1, got 1.0"),
        (lambda: mean_interval([]), "at least one number"),
        (lambda: mean_interval([[1.0]]), r"flat sequence of numbers, got shape \(1, 1\)"),
        (lambda: holm([0.5, 1.5]), r"p_values\[1\] must lie in \[0, 1\], got 1.5"),
        (lambda: fill_diverged([None], [None], "higher"), "every run diverged"),
        (lambda: fill_diverged([1.0], [1.0], "up"), "higher.*lower.*'up'"),
        (lambda: comparison_words(PairedDifference(1, 1, 1, 0), "up"), "higher.*lower.*'up'"),
    ],
)
def test_mistakes_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_a_diverged_run_gets_the_worst_figure_of_the_table():
    assert fill_diverged([0.9, None, math.nan], [0.9, None, 0.2, 0.7], "higher") == [0.9, 0.2, 0.2]
    assert fill_diverged([0.9, math.inf], [0.2, 1.7], "lower") == [0.9, 1.7]


def test_words_follow_the_direction_of_the_metric_and_the_corrected_p():
    loss = PairedDifference(-0.1, -0.2, -0.01, 0.03)
    assert comparison_words(loss, "lower") == "better"
    assert comparison_words(loss, "higher") == "worse"
    assert comparison_words(loss, "lower", p=0.09) == "no detectable difference"
    assert comparison_words(PairedDifference(0.0, 0.0, 0.0, 1.0), "lower") == "no detectable difference"
