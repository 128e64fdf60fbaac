"""Oracles of the schedules: closed forms, double loops, and numbers computed once with the authors' code.

Official numbers: facebookresearch/adaptive_scheduling at 37a8a9b, `find_closed_form_schedule` on norms smoothed as its README
says (numpy 2.4, scipy 1.17), and `find_schedule`.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from gradwise.optim import GradNormLogger, LinearDecay, RefinedSchedule, last_iterate_bound, optimize_schedule, refine_schedule

NORMS = [float((7 * t * t + 3 * t + 5) % 23 + 1 + max(0, 40 - 4 * t)) for t in range(40)]
SOME = [0, 1, 5, 13, 20, 33, 38, 39]
OFFICIAL = {  # (kind, tau): the factors at SOME, the sum of all
    ("l2", 0.1): (
        [0.0608298978943, 0.0606939068771, 0.0926918392822, 0.483533922703, 0.695553102023, 0.0760177594024, 0.00929098199394, 0.0],
        13.1929415525,
    ),
    ("l2", 0.3): (
        [0.0672135063108, 0.0670518698496, 0.10230785086, 0.617251631604, 0.782883957075, 0.0840431184675, 0.01429570653, 0.0],
        13.5679052812,
    ),
    ("l2", 1.0): (
        [0.138594484903, 0.138162874779, 0.209997530267, 0.860507727089, 0.84730743013, 0.338161118961, 0.0503049598455, 0.0],
        21.7051457225,
    ),
    ("l1", 0.1): (
        [0.301837764553, 0.299410769901, 0.358353939728, 0.723728007608, 0.743223965763, 0.139800285307, 0.0200606276748, 0.0],
        18.5283417112,
    ),
    ("l1", 0.3): (
        [0.331820143328, 0.329068147312, 0.393365721325, 0.854914582818, 0.825303292894, 0.153668399769, 0.0258809936453, 0.0],
        19.7641368489,
    ),
    ("l1", 1.0): (
        [0.431842705441, 0.427828643724, 0.508927910239, 0.911829537105, 0.773875418402, 0.274458056551, 0.0433354826133, 0.0],
        23.0167184232,
    ),
}
positive = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12)


def optimizer_with(*rates):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates_of(schedule, steps):
    rates = [[group["lr"] for group in schedule.optimizer.param_groups]]
    for _ in range(steps - 1):
        schedule.optimizer.step()
        schedule.step()
        rates.append([group["lr"] for group in schedule.optimizer.param_groups])
    return rates


# -- refinement


@pytest.mark.parametrize("kind", ["l2", "l1"])
@pytest.mark.parametrize("steps", [2, 3, 10, 101])
def test_constant_norms_give_linear_decay_exactly(kind, steps):
    factors = refine_schedule([0.37] * steps, kind=kind)
    assert factors.tolist() == [(steps - 1 - t) / (steps - 1) for t in range(steps)]


@pytest.mark.parametrize(("kind", "tau"), OFFICIAL)
def test_official_numbers(kind, tau):
    values, total = OFFICIAL[kind, tau]
    factors = refine_schedule(NORMS, kind=kind, tau=tau)
    np.testing.assert_allclose(factors[SOME], values, rtol=1e-10)
    assert float(factors.sum()) == pytest.approx(total, rel=1e-10)


@given(positive)
def test_tail_sums_by_brute_force(weights):
    steps = len(weights)
    rates = [weights[t] * sum(weights[p] for p in range(t + 1, steps)) for t in range(steps)]
    expected = [rate / max(rates) for rate in rates]
    np.testing.assert_allclose(refine_schedule([1.0] * steps, weights=weights), expected, rtol=1e-12, atol=0)


@given(positive, st.sampled_from(["l1", "l2"]), st.sampled_from([0.1, 0.5, 1.0]), st.floats(1e-6, 1e6))
def test_the_scale_of_the_norms_does_not_matter(norms, kind, tau, scale):
    factors = refine_schedule(norms, kind, tau)
    assert float(factors.min()) == float(factors[-1]) == 0.0
    assert float(factors.max()) == 1.0
    np.testing.assert_allclose(refine_schedule([scale * x for x in norms], kind, tau), factors, rtol=1e-9)


def test_the_extremes_of_floating_point_do_not_overflow():
    for scale in (1e-300, 1e300):
        assert refine_schedule([scale] * 5).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_large_early_norms_bring_out_a_warm_up():
    factors = refine_schedule([10.0] * 100 + [1.0] * 900)
    assert 0.009 < float(factors[0]) < 0.0115
    assert float(factors[200:].max()) > 0.85
    assert int(factors.argmax()) in range(80, 130)


def test_norms_that_grow_at_the_end_decay_faster_than_linearly():
    factors = refine_schedule([1.0] * 800 + [1 + t / 20 for t in range(200)])
    linear = refine_schedule([1.0] * 1000)
    assert bool((factors[850:-1] < 0.6 * linear[850:-1]).all())


def test_a_lone_spike_is_filtered_out():
    norms = [1.0] * 100
    norms[40] = 1e6
    assert refine_schedule(norms).tolist() == refine_schedule([1.0] * 100).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_arrays_and_lists_are_the_same_norms(dtype):
    norms = torch.tensor([4.0, 2.0, 1.0, 1.0, 2.0], dtype=dtype)
    expected = refine_schedule([4.0, 2.0, 1.0, 1.0, 2.0])
    assert torch.equal(refine_schedule(norms), expected)
    assert torch.equal(refine_schedule(norms.double().numpy()), expected)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_the_first_bad_norm_is_named(bad):
    ones = [1.0] * 4
    bounds = (lambda x: last_iterate_bound(x, ones), lambda x: last_iterate_bound(ones, x))
    for function in (refine_schedule, optimize_schedule, *bounds):
        with pytest.raises(ValueError, match=r"(norms|rates) must be finite and above 0, got .* at index 2"):
            function([1.0, 1.0, bad, bad])
    with pytest.raises(ValueError, match="weights must be finite"):
        refine_schedule([1.0, 1.0], weights=[1.0, bad])


def test_other_bad_arguments_are_named():
    for norms in ([1.0], [], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="norms must have shape"):
            refine_schedule(norms)
    for tau in (0.0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match="tau"):
            refine_schedule([1.0, 1.0], tau=tau)
    with pytest.raises(ValueError, match="kind"):
        refine_schedule([1.0, 1.0], kind="L2")
    with pytest.raises(ValueError, match="shape of norms"):
        refine_schedule([1.0, 1.0], weights=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="shape of norms"):
        last_iterate_bound([1.0, 1.0], [1.0, 1.0, 1.0])
    for distance in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="distance"):
            optimize_schedule([1.0, 1.0], distance)


# -- the bounds


def test_inverse_square_weights_reach_the_bound_in_closed_form():
    g, distance = np.array(NORMS), 3.0
    w = g**-2.0
    w *= distance / math.sqrt(w.sum())
    bound = (distance**2 + (w**2 * g**2).sum()) / (2 * w.sum())
    assert bound == pytest.approx(distance / math.sqrt((g**-2.0).sum()), rel=1e-12)
    other = w * np.random.default_rng(0).uniform(0.5, 2.0, len(w))
    assert (distance**2 + (other**2 * g**2).sum()) / (2 * other.sum()) > bound
    # the schedule of these weights is the refined one, up to its normalisation
    eta = w * np.append(np.cumsum(w[::-1])[::-1][1:], 0.0)
    np.testing.assert_allclose(refine_schedule(NORMS, weights=w), eta / eta.max(), rtol=1e-12)


def bound_as_published(norms, rates, distance):
    """The last-iterate bound term by term, as the paper writes it."""
    steps = len(norms)
    tail = [sum(rates[k:]) for k in range(steps)]
    value = (distance**2 + sum(g * g * r * r for g, r in zip(norms, rates, strict=True))) / (2 * tail[0])
    for k in range(steps - 1):
        value += 0.5 * rates[k] / (tail[k] * tail[k + 1]) * sum(norms[p] ** 2 * rates[p] ** 2 for p in range(k, steps))
    return value


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=9), st.floats(0.1, 10))
def test_the_bound_is_the_published_sum(pairs, distance):
    norms, rates = zip(*pairs, strict=True)
    assert last_iterate_bound(norms, rates, distance) == pytest.approx(bound_as_published(norms, rates, distance), rel=1e-9)


@settings(deadline=None)
@given(positive, st.floats(0.01, 100))
def test_the_optimal_rates_are_stationary_and_their_bound_is_least(norms, distance):
    rates = optimize_schedule(norms, distance)
    assert bool((rates > 0).all())
    g, r = torch.tensor(norms, dtype=torch.float64), rates.clone().requires_grad_()
    random = np.random.default_rng(0)
    tail = r.flip(0).cumsum(0).flip(0)
    bound = 0.5 * (distance**2 / tail[0] + ((g[:-1] * r[:-1]) ** 2 / tail[1:]).sum() + g[-1] ** 2 * r[-1])
    slope = torch.autograd.grad(bound, r)[0]
    # the slope is a difference of terms as large as the bound over the total rate, or as a squared norm
    assert float(slope.abs().max()) < 1e-9 * (float(bound.detach() / rates.sum()) + max(norms) ** 2)
    for spread in (0.01, 1.0):
        others = rates.numpy() * random.lognormal(0, spread, len(norms))
        assert last_iterate_bound(norms, others, distance) >= float(bound.detach()) * (1 - 1e-12)


def test_optimal_rates_of_the_official_solver():
    constant = [0.24763858, 0.227199, 0.20691853, 0.18682432, 0.1669507, 0.14734179, 0.12805537, 0.10916871, 0.090787537, 0.2191805]
    np.testing.assert_allclose(optimize_schedule([1.0] * 10), constant, rtol=1e-5)
    varied = [0.071402112, 0.24701868, 0.60087362, 0.39797854, 0.22709758, 0.058645399, 0.073053287]
    np.testing.assert_allclose(optimize_schedule([4.0, 2.0, 1.0, 1.0, 1.0, 2.0, 3.0], 2.0), varied, rtol=1e-5)


def test_a_general_minimizer_finds_nothing_better_and_linear_decay_is_not_better():
    norms, steps = NORMS[:12], 12
    rates = optimize_schedule(norms)
    best = last_iterate_bound(norms, rates)
    start = np.full(steps, 0.01)
    found = minimize(lambda x: bound_as_published(norms, x, 1.0), start, method="L-BFGS-B", bounds=[(1e-8, None)] * steps)
    assert best <= found.fun
    assert best == pytest.approx(found.fun, rel=1e-4)
    for scale in np.logspace(-4, 0, 30):
        linear = [scale * (1 - t / steps) for t in range(steps)]
        assert best <= last_iterate_bound(norms, linear)


def test_for_constant_norms_the_optimum_tends_to_linear_decay():
    rates = optimize_schedule(torch.ones(4000), distance=2.0)
    linear = torch.arange(4000, 0, -1, dtype=torch.float64) / 4000
    torch.testing.assert_close((rates / rates.max())[:-50], linear[:-50], rtol=0, atol=2e-3)
    assert torch.equal(optimize_schedule([2.0**900] * 5), optimize_schedule([1.0] * 5) / 2.0**900)


# -- the schedules


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_linear_decay_is_the_refinement_of_constant_norms_and_wastes_no_update(steps):
    linear = rates_of(LinearDecay(optimizer_with(1.0), steps), steps + 1)
    refined = rates_of(RefinedSchedule(optimizer_with(1.0), refine_schedule([2.0] * (steps + 1))), steps + 1)
    assert linear == refined == [[(steps - t) / steps] for t in range(steps + 1)]
    assert all(rate > 0 for (rate,) in linear[:-1])
    assert linear[-1] == [0.0]


def test_warm_up_climbs_to_the_base_rate_and_decay_starts_there():
    rates = [rate for (rate,) in rates_of(LinearDecay(optimizer_with(3.0), 10, warmup=4), 11)]
    np.testing.assert_allclose(rates, [0.75, 1.5, 2.25, 3.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.0], rtol=1e-15)


def test_factors_are_stretched_linearly_to_another_length():
    rates = [rate for (rate,) in rates_of(RefinedSchedule(optimizer_with(2.0), [0.0, 1.0, 0.5], total_steps=8), 9)]
    np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, 1.5, 2.0, 1.75, 1.5, 1.25, 1.0])
    shrunk = [rate for (rate,) in rates_of(RefinedSchedule(optimizer_with(1.0), refine_schedule([1.0] * 1001), total_steps=4), 5)]
    np.testing.assert_allclose(shrunk, [1.0, 0.75, 0.5, 0.25, 0.0], rtol=1e-12)
    assert shrunk[-1] == 0.0


def test_refined_sgd_trains_at_the_rates_it_says():
    w = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([w], lr=0.1)
    schedule = RefinedSchedule(optimizer, refine_schedule([2.0, 1.0, 1.0, 1.0]))
    for _ in range(3):
        w.grad = torch.ones(())
        optimizer.step()
        schedule.step()
    # weights 1/4, 1, 1, 1 over tails 3, 2, 1, 0
    assert float(w.detach()) == pytest.approx(-0.1 * (0.375 + 1.0 + 0.5), rel=1e-6)


def test_bad_schedules_are_named():
    for steps in (0, -3):
        with pytest.raises(ValueError, match="total_steps"):
            LinearDecay(optimizer_with(1.0), steps)
        with pytest.raises(ValueError, match="total_steps"):
            RefinedSchedule(optimizer_with(1.0), [1.0, 0.0], total_steps=steps)
    for warmup in (-1, 5, 6):
        with pytest.raises(ValueError, match="warmup"):
            LinearDecay(optimizer_with(1.0), 5, warmup=warmup)
    for factors in ([1.0, -0.1], [math.nan, 1.0], [1.0], [[1.0, 0.0]]):
        with pytest.raises(ValueError, match="factors"):
            RefinedSchedule(optimizer_with(1.0), factors)


# -- the logger


@pytest.mark.parametrize("order", [1, 2])
def test_the_logger_takes_the_norm_of_the_whole_gradient(order):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    frozen = nn.Parameter(torch.zeros(3))
    logger = GradNormLogger([*model.parameters(), frozen], order=order)
    expected = []
    for step in range(4):
        model.zero_grad()
        model(torch.full((2, 3), 1.0 + step)).square().sum().backward()
        whole = torch.cat([p.grad.flatten() for p in model.parameters()])
        expected.append(float(whole.abs().sum() if order == 1 else whole.square().sum().sqrt()))
        assert float(logger.log()) == pytest.approx(expected[-1], rel=1e-6)
    np.testing.assert_allclose(logger.norms, expected, rtol=1e-6)
    assert torch.equal(logger.refined(), refine_schedule(logger.norms, kind=f"l{order}"))


def test_the_logger_resumes_and_never_mixes_orders(tmp_path):
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    w.grad = torch.tensor([3.0, 4.0])
    first = GradNormLogger([w])
    first.log()
    torch.save(first.state_dict(), tmp_path / "norms.pt")
    second = GradNormLogger([w])
    second.load_state_dict(torch.load(tmp_path / "norms.pt", weights_only=True))
    second.log()
    assert second.norms.tolist() == [5.0, 5.0]
    with pytest.raises(ValueError, match="order"):
        GradNormLogger([w], order=1).load_state_dict(first.state_dict())


def test_the_logger_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="order"):
        GradNormLogger([nn.Parameter(torch.zeros(1))], order=3)
    with pytest.raises(ValueError, match="params"):
        GradNormLogger([])
    with pytest.raises(ValueError, match="gradient"):
        GradNormLogger([nn.Parameter(torch.zeros(1))]).log()
    assert GradNormLogger([nn.Parameter(torch.zeros(1))]).norms.shape == (0,)
