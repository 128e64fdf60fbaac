"""Oracles of comp_sum: torch's cross-entropy, closed forms, 50-digit arithmetic, brute force over distributions."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from gradwise.losses import CompSumLoss, comp_sum_loss, h_consistency_bound

TAUS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def labels(classes: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


# ---- the family ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 5, 4), (2, 5, 3, 2)], ids=str)
def test_tau_one_is_torch_cross_entropy_with_every_combination_of_its_arguments(shape, dtype):
    logits = normal(*shape, dtype=dtype) * 3
    indices = labels(5, *(shape[:1] + shape[2:] if len(shape) > 1 else ()))
    probabilities = normal(*shape, seed=1, dtype=dtype).softmax(min(1, len(shape) - 1))
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=dtype)
    for target, weight, ignore, smoothing, reduction in itertools.product(
        (indices, probabilities), (None, weights), (-100, 2), (0.0, 0.1, 1.0), ("mean", "sum", "none")
    ):
        if target is probabilities and ignore >= 0:
            continue
        arguments = {"weight": weight, "ignore_index": ignore, "label_smoothing": smoothing, "reduction": reduction}
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        value, expected = comp_sum_loss(ours, target, **arguments), cross_entropy(theirs, target, **arguments)
        torch.testing.assert_close(value, expected, equal_nan=True, msg=lambda text, a=arguments: f"{a}: {text}")
        value.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True, msg=lambda text, a=arguments: f"{a}: {text}")


def test_named_members():
    logits, target = normal(20, 4), labels(4, 20)
    p = logits.softmax(1)[torch.arange(20), target]

    def loss(tau: float) -> Tensor:
        return comp_sum_loss(logits, target, tau, reduction="none")

    others = (logits - logits.gather(1, target[:, None])).exp().sum(1) - 1
    torch.testing.assert_close(loss(0.0), others)  # sum-exponential
    torch.testing.assert_close(loss(1.0), torch.log1p(others))  # logistic
    for q in (0.1, 0.5, 0.7, 0.9):
        torch.testing.assert_close(loss(1 + q), (1 - p**q) / q)  # generalized cross-entropy
    torch.testing.assert_close(loss(2.0), 1 - p)  # mean absolute error


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6), st.floats(0, 3))
def test_both_printed_forms_agree_in_exact_arithmetic(scores, tau):
    value = comp_sum_loss(torch.tensor(scores, dtype=torch.float64), torch.tensor(0), tau).item()
    with mpmath.workdps(60):
        u = mpmath.fsum(mpmath.exp(mpmath.mpf(s) - mpmath.mpf(scores[0])) for s in scores[1:])
        t = mpmath.mpf(tau)
        exact = mpmath.log1p(u) if tau == 1 else ((1 + u) ** (1 - t) - 1) / (1 - t)
        # log_softmax rounds log(1 + u) to one unit of 1; everything after it keeps its digits.
        assert abs(mpmath.mpf(value) - exact) <= 1e-12 * exact + 1e-15 * (1 + u) ** (1 - t)


@pytest.mark.parametrize("offset", [1e-6, -1e-6, 1e-12])
def test_continuous_in_tau_at_one(offset):
    logits, target = normal(50, 6) * 5, labels(6, 50)
    torch.testing.assert_close(comp_sum_loss(logits, target, 1 + offset), comp_sum_loss(logits, target, 1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("tau", TAUS)
def test_gradient_is_that_of_cross_entropy_weighted_by_a_power_of_p(tau):
    logits, target = (normal(12, 5) * 4).requires_grad_(), labels(5, 12)
    comp_sum_loss(logits, target, tau, reduction="sum").backward()
    p = logits.detach().softmax(1)
    weight = p.gather(1, target[:, None]) ** (tau - 1)
    torch.testing.assert_close(logits.grad, weight * (p - one_hot(target, 5)), rtol=1e-9, atol=1e-12)


def test_small_gradients_keep_their_digits_in_float32():
    """expm1(x) + 1 is 0 in float32 from x = -17 on, and is what autograd would use; the true slope is e^-20."""
    logits = torch.tensor([0.0, 20.0], requires_grad=True)
    comp_sum_loss(logits, torch.tensor(0), 2.0).backward()
    assert logits.grad[0].item() == pytest.approx(-math.exp(-20), rel=1e-5)


def test_probabilities_and_smoothing_are_the_expected_loss():
    logits, q = normal(6, 3), normal(6, 3, seed=1).softmax(1)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    each = torch.stack([comp_sum_loss(logits, torch.full((6,), c), 1.7, reduction="none") for c in range(3)], 1)
    torch.testing.assert_close(comp_sum_loss(logits, q, 1.7, weight=weight, reduction="none"), (q * weight * each).sum(1))
    target = labels(3, 6)
    smoothed = 0.8 * each.gather(1, target[:, None]).squeeze(1) + 0.2 * each.mean(1)
    torch.testing.assert_close(comp_sum_loss(logits, target, 1.7, label_smoothing=0.2, reduction="none"), smoothed)


def test_ignored_examples_may_hold_any_numbers():
    logits = normal(4, 3)
    broken = torch.cat([logits, torch.full((1, 3), 1e300, dtype=torch.float64)]).requires_grad_()
    target = torch.tensor([0, 1, 2, 0, -100])
    for tau in TAUS:
        loss = comp_sum_loss(broken, target, tau)
        torch.testing.assert_close(loss, comp_sum_loss(logits, target[:4], tau))
        (grad,) = torch.autograd.grad(loss, broken)
        assert grad[4].eq(0).all()


def test_masked_classes_of_minus_infinity_are_no_classes():
    logits = torch.cat([normal(5, 3), torch.full((5, 2), -math.inf, dtype=torch.float64)], 1).requires_grad_()
    for tau in TAUS:
        loss = comp_sum_loss(logits, labels(3, 5), tau)
        torch.testing.assert_close(loss, comp_sum_loss(logits[:, :3], labels(3, 5), tau))
        (grad,) = torch.autograd.grad(loss, logits)
        assert grad.isfinite().all()


def test_other_integer_types_are_class_indices_too():
    logits, target = normal(6, 4), labels(4, 6)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(comp_sum_loss(logits, target.to(dtype), 1.5), comp_sum_loss(logits, target, 1.5))


def test_module_keeps_its_weight_in_the_state_and_shows_its_arguments():
    module = CompSumLoss(1.5, weight=torch.tensor([1.0, 2.0]), label_smoothing=0.1)
    assert module.state_dict()["weight"].tolist() == [1.0, 2.0]
    assert repr(module) == "CompSumLoss(tau=1.5, ignore_index=-100, label_smoothing=0.1, reduction='mean')"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": -0.1}, "tau.*-0.1"),
        ({"tau": math.nan}, "tau.*nan"),
        ({"label_smoothing": 1.5}, "label_smoothing.*1.5"),
        ({"reduction": "average"}, "reduction.*'average'"),
        ({"weight": torch.ones(4)}, r"\(2, 3\).*\(3,\).*\(4,\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        comp_sum_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), **arguments)


def test_bad_targets_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2,\).*\(3,\)"):
        comp_sum_loss(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        comp_sum_loss(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="ignore_index=1"):
        comp_sum_loss(torch.zeros(2, 3), torch.zeros(2, 3), ignore_index=1)
    with pytest.raises(IndexError, match="5"):
        comp_sum_loss(torch.zeros(2, 3), torch.tensor([0, 5]))
    with pytest.raises(TypeError, match="int64"):
        comp_sum_loss(torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1]))


# ---- the consistency bound ----


def transform(b: mpmath.mpf, tau: float, n: int) -> mpmath.mpf:
    """T_tau as printed, in 60 digits."""
    t = mpmath.mpf(tau)
    if tau == 1:
        return ((1 + b) * mpmath.log(1 + b) + (1 - b) * mpmath.log(1 - b)) / 2
    if tau >= 2:
        return b / ((t - 1) * mpmath.mpf(n) ** (t - 1))
    mean = (((1 + b) ** (1 / (2 - t)) + (1 - b) ** (1 / (2 - t))) / 2) ** (2 - t)
    return 2 ** (1 - t) / (1 - t) * (1 - mean) if tau < 1 else (mean - 1) / ((t - 1) * mpmath.mpf(n) ** (t - 1))


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 0.99, 1 - 1e-6, 1.0, 1 + 1e-6, 1.01, 1.5, 1.9, 1.999, 2.0, 2.5])
@pytest.mark.parametrize("share", [1e-12, 1e-6, 0.01, 0.3, 0.9])
def test_bound_inverts_the_transform(tau, share):
    with mpmath.workdps(60):
        excess = float(share * transform(1 - mpmath.mpf(10) ** -50, tau, 7))
        b = h_consistency_bound(excess, tau, 7)
        assert float(transform(mpmath.mpf(b), tau, 7)) == pytest.approx(excess, rel=1e-7)


def test_bound_has_closed_forms_at_zero_and_three_halves():
    for excess in (1e-9, 1e-3, 0.2, 0.8):
        assert h_consistency_bound(excess, 0.0, 5) == pytest.approx(math.sqrt(excess * (2 - excess)), rel=1e-12)
    for excess in (1e-9, 1e-3, 0.1):
        assert h_consistency_bound(excess, 1.5, 4) == pytest.approx(math.sqrt(excess * (2 + excess)), rel=1e-12)  # sqrt(n)/2 = 1


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.just(0.0), st.floats(1e-200, 4)), st.floats(0, 3), st.integers(2, 50))
def test_bound_lies_below_the_closed_one_and_is_a_difference_of_error_rates(excess, tau, n):
    exact, closed = h_consistency_bound(excess, tau, n), h_consistency_bound(excess, tau, n, closed=True)
    assert 0 <= exact <= closed * (1 + 1e-9) <= 1 + 1e-9
    assert exact <= h_consistency_bound(2 * excess, tau, n)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3, 1.7, 2.0, 2.5])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_bound_holds_for_random_distributions_and_scores(tau, n):
    """All measurable functions, one x: the gaps M are 0, and the best conditional loss is known in closed form."""
    q = (normal(20_000, n, seed=1) * normal(20_000, 1, seed=2).exp()).softmax(1)  # conditional label probabilities
    scores = q.log() + normal(20_000, n, seed=3) * normal(20_000, 1, seed=4)
    power = tau - 1

    def conditional(p: Tensor) -> Tensor:
        return (q * (-p.log() if tau == 1 else (1 - p**power) / power)).sum(1)

    if tau < 2:
        best_p = q ** (1 / (2 - tau))
        best = conditional(best_p / best_p.sum(1, keepdim=True))
    else:
        best = (1 - q.amax(1)) / power  # concave in p: best at a vertex
    each = torch.stack([comp_sum_loss(scores, torch.full((len(q),), c), tau, reduction="none") for c in range(n)], 1)
    excess = ((q * each).sum(1) - best).clamp(min=0)
    error = q.amax(1) - q.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
    wrong = (error > 0).nonzero().squeeze(1)[:400]
    assert len(wrong) > 100
    for i in wrong.tolist():
        assert error[i].item() <= h_consistency_bound(excess[i].item(), tau, n) + 1e-7


@pytest.mark.parametrize(("arguments", "name"), [((-0.1, 1.0, 2), "excess"), ((0.1, -1.0, 2), "tau"), ((0.1, 1.0, 1), "n_classes")])
def test_bound_names_bad_arguments(arguments, name):
    with pytest.raises(ValueError, match=name):
        h_consistency_bound(*arguments)
