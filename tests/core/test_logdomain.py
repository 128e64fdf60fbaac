"""Oracles of the log-domain kernel: 50-digit arithmetic, brute-force sums and identities."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradwise.core import logdomain

DTYPES = (torch.float32, torch.float64)
floats = st.floats(-1e4, 1e4, allow_nan=False, width=32)


def evaluated(function, x: float, dtype: torch.dtype) -> tuple[float, float]:
    """Value and derivative of an elementwise function at one point."""
    point = torch.tensor(x, dtype=dtype, requires_grad=True)
    value = function(point)
    (slope,) = torch.autograd.grad(value, point)
    return value.item(), slope.item()


def assert_near(got: float, exact: mpmath.mpf, dtype: torch.dtype, units: float = 8) -> None:
    """Within a few units in the last place, or below what the type can hold."""
    info = torch.finfo(dtype)
    assert abs(mpmath.mpf(got) - exact) <= units * info.eps * abs(exact) + info.tiny, (got, exact)


def rounded(x: float, dtype: torch.dtype) -> mpmath.mpf:
    return mpmath.mpf(torch.tensor(x, dtype=dtype).item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x", [-1e4, -90.0, -20.0, -1.0, -0.7, -math.log(2), -0.69, -1e-3, -1e-10, -1e-30])
def test_log1mexp_has_all_its_digits(x, dtype):
    with mpmath.workdps(60):
        exact = rounded(x, dtype)
        value, slope = evaluated(logdomain.log1mexp, x, dtype)
        assert_near(value, mpmath.log1p(-mpmath.exp(exact)), dtype)
        assert_near(slope, -1 / mpmath.expm1(-exact), dtype)


def test_log1mexp_undoes_itself():
    x = -torch.logspace(-3, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(logdomain.log1mexp(logdomain.log1mexp(x)), x, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x", [-1e4, -80.0, -21.0, -1.0, 0.0, 1.0, 19.0, 21.0, 30.0, 1e4])
def test_log1pexp_has_all_its_digits(x, dtype):
    with mpmath.workdps(60):
        exact = rounded(x, dtype)
        value, slope = evaluated(logdomain.log1pexp, x, dtype)
        assert_near(value, mpmath.log1p(mpmath.exp(exact)), dtype)
        assert_near(slope, 1 / (1 + mpmath.exp(-exact)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [-1.0, -0.5, -1e-6, 1e-6, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("x", [-30.0, -1.5, -1.0, -0.1, -1e-6, 0.0])
def test_generalized_nll_has_all_its_digits(x, power, dtype):
    with mpmath.workdps(60):
        exact = rounded(x, dtype)
        value, slope = evaluated(lambda t: logdomain.generalized_nll(t, power), x, dtype)
        assert_near(value, -mpmath.expm1(power * exact) / power, dtype, units=64)  # the exponent's rounding, times up to 30
        assert_near(slope, -mpmath.exp(power * exact), dtype, units=64)


def test_generalized_nll_at_power_zero_is_the_nll_and_the_limit():
    log_p = torch.linspace(-40, 0, 50, dtype=torch.float64)
    assert torch.equal(logdomain.generalized_nll(log_p, 0.0), -log_p)
    for power in (1e-9, -1e-9):
        torch.testing.assert_close(logdomain.generalized_nll(log_p, power), -log_p, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "start"), [(torch.float32, 62.1), (torch.float64, 496.8)])
def test_generalized_nll_continues_along_its_tangent(dtype, start):
    value, slope = evaluated(lambda t: logdomain.generalized_nll(t, -1.0), -1e4, dtype)
    at_start, slope_at_start = evaluated(lambda t: logdomain.generalized_nll(t, -1.0), -start, dtype)
    assert math.isfinite(value)
    assert math.isfinite(slope)
    assert slope == pytest.approx(slope_at_start, rel=0.3)  # start is rounded to one decimal
    assert value == pytest.approx(at_start - slope * (1e4 - start), rel=0.05)


@pytest.mark.parametrize("power", [-0.7, 0.4])
def test_generalized_nll_in_every_mode_of_differentiation(power):
    """The third derivative, all ways round: -power^2 p^power."""

    def total(x: Tensor) -> Tensor:
        return logdomain.generalized_nll(x, power).sum()

    x = torch.linspace(-5, -0.1, 4, dtype=torch.float64)
    ones = torch.ones_like(x)
    expected = -(power**2) * (power * x).exp()

    def forward(f):
        return lambda v: torch.func.jvp(f, (v,), (ones,))[1]

    reverse = torch.func.grad(total)
    torch.testing.assert_close(forward(forward(reverse))(x), expected)
    torch.testing.assert_close(torch.func.grad(lambda v: forward(reverse)(v).sum())(x), expected)
    torch.testing.assert_close(torch.func.grad(lambda v: forward(forward(total))(v).sum())(x), expected)
    torch.testing.assert_close(forward(forward(forward(lambda v: logdomain.generalized_nll(v, power))))(x), expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(floats, min_size=1, max_size=9), st.data())
def test_logcumsumexp_is_the_logarithm_of_the_partial_sums(values, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    reverse = data.draw(st.booleans())
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    total = logdomain.logcumsumexp(x, keep=torch.tensor(keep), reverse=reverse)
    (slopes,) = torch.autograd.grad(total.where(total > -1e300, 0.0).sum(), x)
    expected = torch.zeros_like(x)
    for i in range(len(values)):
        group = [j for j in (range(i, len(values)) if reverse else range(i + 1)) if keep[j]]
        if not group:
            assert total[i] < -1e300
            continue
        picked = x.detach()[group]
        torch.testing.assert_close(total[i].detach(), picked.logsumexp(0), rtol=1e-12, atol=1e-12)
        expected[group] += picked.softmax(0)  # the derivative of logsumexp
    torch.testing.assert_close(slopes, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logcumsumexp_is_finite_at_the_edges(dtype):
    x = torch.tensor([[-math.inf, -math.inf, 1e4, -1e4], [1e4, -1e4, -math.inf, 1e4]], dtype=dtype, requires_grad=True)
    total = logdomain.logcumsumexp(x, dim=1)
    total.where(total > -1e30, 0.0).sum().backward()
    assert total.isfinite().all()
    assert x.grad.isfinite().all()
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_logcumsumexp_sums_along_any_dimension():
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dim in range(3):
        torch.testing.assert_close(logdomain.logcumsumexp(x, dim), x.exp().cumsum(dim).log())


@settings(max_examples=40, deadline=None)
@given(st.lists(floats, min_size=1, max_size=5), st.lists(floats, min_size=1, max_size=5))
def test_pairwise_softplus_is_the_double_loop(higher, lower):
    table = logdomain.pairwise_softplus(torch.tensor(higher, dtype=torch.float64), torch.tensor(lower, dtype=torch.float64))
    for i, a in enumerate(higher):
        for j, b in enumerate(lower):
            exact = float(mpmath.log1p(mpmath.exp(mpmath.mpf(b) - mpmath.mpf(a))))
            assert table[i, j].item() == pytest.approx(exact, rel=1e-12, abs=1e-300)


def test_masked_pairs_cost_nothing_and_get_no_gradient_even_if_infinite():
    scores = torch.tensor([1.0, -1.0, math.inf, math.nan], requires_grad=True)
    real = torch.tensor([True, True, False, False])
    table = logdomain.pairwise_softplus(scores, scores, keep=real.unsqueeze(0) & real.unsqueeze(1))
    table.sum().backward()
    softplus = [math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2)), math.log(2)]
    torch.testing.assert_close(table[:2, :2].flatten(), torch.tensor(softplus))
    assert table[2:].eq(0).all()
    assert table[:, 2:].eq(0).all()
    torch.testing.assert_close(scores.grad, torch.tensor([math.tanh(1), -math.tanh(1), 0.0, 0.0]))  # sigmoid(2) - sigmoid(-2)


def test_pairwise_softplus_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 3\)"):
        logdomain.pairwise_softplus(torch.zeros(2, 3), torch.zeros(4, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(floats, st.booleans(), st.floats(0.125, 8, width=32)), min_size=1, max_size=8))
def test_reduce_is_the_loop_over_what_is_kept(rows):
    values, weights = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (0, 2))
    keep = torch.tensor([row[1] for row in rows])
    kept = [row for row in rows if row[1]]
    total = math.fsum(row[0] for row in kept)
    assert logdomain.reduce(values, keep, "none").tolist() == [v if k else 0.0 for v, k, _ in rows]
    assert logdomain.reduce(values, keep, "sum").item() == pytest.approx(total, abs=1e-8)
    mean, weighted = logdomain.reduce(values, keep).item(), logdomain.reduce(values, keep, weight=weights).item()
    if kept:
        assert mean == pytest.approx(total / len(kept), abs=1e-8)
        assert weighted == pytest.approx(total / math.fsum(row[2] for row in kept), abs=1e-7)
    else:
        assert math.isnan(mean)
        assert math.isnan(weighted)


def test_reduce_drops_infinite_values_and_their_gradients():
    values = torch.tensor([1.0, math.inf, math.nan], requires_grad=True)
    total = logdomain.reduce(values, torch.tensor([True, False, False]), "mean")
    total.backward()
    assert total.item() == 1.0
    assert values.grad.tolist() == [1.0, 0.0, 0.0]


def test_reduce_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'average'"):
        logdomain.reduce(torch.zeros(2), None, "average")
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        logdomain.reduce(torch.zeros(2), torch.ones(3, dtype=torch.bool))


def test_log_softmax_of_short_types_is_that_of_the_same_numbers_in_float32():
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(logdomain.log_softmax(logits), logits.float().log_softmax(-1))
    assert logdomain.log_softmax(logits.double()).dtype == torch.float64


ELEMENTWISE = {
    "log1mexp": lambda x: logdomain.log1mexp(-x.abs() - 0.01),
    "log1pexp": logdomain.log1pexp,
    "generalized_nll": lambda x: logdomain.generalized_nll(-x.abs(), 0.5),
    "logcumsumexp": logdomain.logcumsumexp,
    "pairwise_softplus": lambda x: logdomain.pairwise_softplus(x, x),
    "log_softmax": logdomain.log_softmax,
}


@pytest.mark.parametrize("function", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_first_and_second_derivatives_and_torch_func(function):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)

    def total(row: Tensor) -> Tensor:
        return function(row).sum()

    (together,) = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(x.detach()), together)


def test_integers_are_refused():
    for function in (logdomain.at_least_float32, logdomain.log_softmax):
        with pytest.raises(TypeError, match=r"torch\.int64"):
            function(torch.tensor([1, 2]))
