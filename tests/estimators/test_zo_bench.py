"""SPSA: identities of a finite difference along a Gaussian direction, from the card of zo_bench and from algebra."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradwise.core.cost import CostMeter, PeakMemory
from gradwise.core.named_tensors import dense
from gradwise.core.protocols import loss_function, supervised, trainable
from gradwise.core.seeded import noise, perturb
from gradwise.estimators import SPSA, Backprop, spsa

CROSS_ENTROPY = supervised(nn.functional.cross_entropy)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inner(a: dict[str, Tensor], seed: int) -> float:
    """<a, u> with the perturbation of that seed."""
    return math.fsum(float((x * noise(seed, n, x.shape, x.dtype)).sum()) for n, x in a.items())


def quadratic(shapes: list[tuple[int, ...]]):
    """f = 0.5 theta' H theta + b' theta over all tensors together, its parameters and its exact gradient."""
    params = {f"p{i}": torch.randn(s, dtype=torch.float64) for i, s in enumerate(shapes)}
    d = sum(p.numel() for p in params.values())
    h, b = torch.randn(d, d, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    h = h @ h.T / d

    def f(params, batch):
        x = torch.cat([p.reshape(-1) for p in params.values()])
        return 0.5 * x @ h @ x + b @ x

    x = torch.cat([p.reshape(-1) for p in params.values()])
    pieces = (h @ x + b).split([p.numel() for p in params.values()])
    return f, params, {n: g.view(p.shape) for (n, p), g in zip(params.items(), pieces, strict=True)}, h


SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=3)


@given(shapes=SHAPES, mu=st.floats(1e-3, 100), sides=st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None)
def test_linear_slope_is_exact_at_any_distance(shapes, mu, sides):
    a = {f"p{i}": torch.randn(s, dtype=torch.float64) for i, s in enumerate(shapes)}
    params = {n: torch.randn_like(x) for n, x in a.items()}
    _, grads = spsa(lambda p, _: sum((p[n] * a[n]).sum() for n in a), params, None, mu=mu, sides=sides, generator=seeded())
    for g in grads.values():
        ((seed, slope),) = g.terms
        assert slope == pytest.approx(inner(a, seed), rel=1e-8, abs=1e-8)


@given(shapes=SHAPES, mu=st.floats(1e-2, 10), q=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_quadratic_two_sided_slope_is_exact_at_any_distance(shapes, mu, q):
    f, params, exact, _ = quadratic(shapes)
    _, grads = spsa(f, params, None, mu=mu, q=q, generator=seeded())
    for g in grads.values():
        for seed, slope in g.terms:
            assert slope * q == pytest.approx(inner(exact, seed), rel=1e-7, abs=1e-7)


def test_quadratic_one_sided_slope_is_off_by_half_mu_times_the_curvature():
    f, params, exact, h = quadratic([(3,), (2, 2)])
    for mu in (1e-2, 1.0):
        _, grads = spsa(f, params, None, mu=mu, sides=1, generator=seeded())
        ((seed, slope),) = grads["p0"].terms
        u = torch.cat([noise(seed, n, p.shape, p.dtype).view(-1) for n, p in params.items()])
        assert slope == pytest.approx(inner(exact, seed) + 0.5 * mu * float(u @ h @ u), rel=1e-9)


@pytest.mark.parametrize("sides", [1, 2])
def test_gaussian_identities_of_mean_and_second_moment(sides):
    """E g = grad and E||g||^2 = (d + q + 1)/q ||grad||^2, over the single draws and over groups of q of one large call."""
    f, params, exact, _ = quadratic([(5,)])
    draws = 12_000
    _, grads = spsa(f, params, None, mu=1e-4, q=draws, sides=sides, generator=seeded(3))
    g = torch.stack([c * draws * noise(s, "p0", (5,), torch.float64) for s, c in grads["p0"].terms])
    grad = exact["p0"]
    error = (g.mean(0) - grad).abs()
    assert (error < 5 * g.std(0) / draws**0.5).all()
    for q in (1, 4):
        square = g.view(-1, q, 5).mean(1).square().sum(1)
        expected = (5 + q + 1) / q * grad.square().sum()
        assert abs(square.mean() - expected) < 4 * square.std() / len(square) ** 0.5
        assert abs(square.mean() - expected) < 0.1 * expected


def test_q_draws_are_the_mean_of_single_draws():
    f, params, _, _ = quadratic([(4, 3), (2,)])
    _, together = spsa(f, params, None, q=5, generator=seeded())
    generator = seeded()
    singles = [spsa(f, params, None, generator=generator) for _ in range(5)]
    for name in params:
        mean = torch.stack([grads[name].materialize() for _, grads in singles]).mean(0)
        torch.testing.assert_close(together[name].materialize(), mean)
        assert {s for s, _ in together[name].terms} == {grads[name].terms[0][0] for _, grads in singles}


def test_the_step_is_exactly_minus_lr_times_the_gradient():
    f, params, _, _ = quadratic([(4, 3), (2,)])
    before = {n: p.clone() for n, p in params.items()}
    _, grads = spsa(f, params, None, q=2, generator=seeded())
    for name in reversed(params):
        grads[name].add_to_(params[name], alpha=-0.1)
        assert torch.equal(params[name], before[name].add(grads[name].materialize(), alpha=-0.1))


def test_slope_agrees_with_the_directional_derivative_of_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    batch = torch.randn(32, 8).double(), torch.randint(4, (32,))
    f, params = loss_function(model, CROSS_ENTROPY), trainable(model)
    _, exact = Backprop()(f, params, batch)
    _, grads = spsa(f, params, batch, mu=1e-4, q=3, generator=seeded())
    for seed, slope in grads["0.weight"].terms:
        assert 3 * slope == pytest.approx(inner({n: dense(g) for n, g in exact.items()}, seed), rel=1e-5, abs=1e-7)


def test_loss_is_the_mean_of_the_two_sides_or_the_loss_here():
    f, params, _, _ = quadratic([(5,)])
    two, grads = spsa(f, params, None, mu=0.5, q=2, generator=seeded())
    sides = [float(f(perturb(params, s, scale), None)) for s, _ in grads["p0"].terms for scale in (0.5, -0.5)]
    assert float(two) == pytest.approx(sum(sides) / 4, rel=1e-12)
    one, _ = spsa(f, params, None, mu=0.5, q=2, sides=1, generator=seeded())
    assert float(one) == float(f(params, None))


@pytest.mark.parametrize(("sides", "q", "forwards"), [(2, 1, 2), (2, 3, 6), (1, 1, 2), (1, 3, 4)])
def test_it_takes_2q_or_q_plus_1_forward_passes_and_no_backward(sides, q, forwards):
    model, meter = nn.Linear(3, 1), CostMeter()
    SPSA(q=q, sides=sides).backward(model, meter.counted(lambda m, x: m(x).square().mean()), torch.ones(2, 3))
    assert (meter.forwards, meter.backwards) == (forwards, 0)


def test_losses_without_a_derivative_and_losses_that_differentiate_inside_both_work():
    model, x, target = nn.Linear(4, 3), torch.randn(50, 4), torch.randint(3, (50,))
    error_rate = supervised(lambda logits, target: (logits.argmax(1) != target).float().mean())
    loss, _ = SPSA(mu=0.5)(loss_function(model, error_rate), trainable(model), (x, target))
    assert 0 <= float(loss) <= 1

    def penalty(model, x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum()  # 50 |sum of the rows of W|^2, quadratic in W

    _, grads = spsa(loss_function(model, penalty), trainable(model), x, mu=0.1, generator=seeded())
    ((seed, slope),) = grads["weight"].terms
    row_sum = model.weight.detach().sum(0)
    assert slope == pytest.approx(inner({"weight": (100 * row_sum).expand(3, 4)}, seed), rel=1e-3)


# --- one step moves the world once --------------------------------------------------------------------------


def test_both_evaluations_see_the_same_dropout_mask_and_the_generator_moves_once():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 1, bias=False)).double().train()
    x = torch.ones(1, 20).double()
    torch.manual_seed(5)
    start = torch.get_rng_state()
    kept = model[0](x)  # linear in the weight: under one mask the slope is <mask, u>, at any mu
    after_one = torch.get_rng_state()
    torch.set_rng_state(start)
    _, grads = SPSA(mu=1.0, q=3).__call__(loss_function(model, lambda m, x: m(x).sum()), trainable(model), x)
    assert torch.equal(torch.get_rng_state(), after_one)
    for seed, slope in grads["1.weight"].terms:
        assert 3 * slope == pytest.approx(inner({"1.weight": kept}, seed), rel=1e-9)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("through", ["call", "backward"])
def test_batch_statistics_move_once_a_step(sides, through):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    x, estimator = torch.randn(16, 4), SPSA(mu=1e-6, q=4, sides=sides)
    if through == "call":
        estimator(loss_function(model, lambda m, x: m(x).square().mean()), trainable(model), x)
    else:
        estimator.backward(model, lambda m, x: m(x).square().mean(), x)
    assert int(model[1].num_batches_tracked) == 1
    torch.testing.assert_close(model[1].running_mean, 0.1 * model[0](x).mean(0).detach(), rtol=1e-3, atol=1e-4)


def test_evaluation_mode_leaves_batch_statistics_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    SPSA().backward(model, lambda m, x: m(x).square().mean(), torch.randn(16, 4))
    assert int(model[1].num_batches_tracked) == 0
    assert torch.equal(model[1].running_mean, torch.zeros(3))


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_runs_at_the_memory_of_inference_whatever_q(dtype):
    model = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(256, 256), nn.Tanh())], nn.Linear(256, 4)).to(dtype)
    batch = torch.randn(32, 256, dtype=dtype), torch.randint(4, (32,))
    f, params = loss_function(model, CROSS_ENTROPY), trainable(model)
    with torch.no_grad(), PeakMemory() as inference:
        f(params, batch)
    with PeakMemory() as exact:
        Backprop()(f, params, batch)
    largest, in_float32 = (256 * 256 + 256) * dtype.itemsize, (256 * 256 + 256) * 4
    one_tensor = largest if dtype == torch.float32 else largest + in_float32
    slack = 2 * torch.get_rng_state().nbytes + 1024
    for q in (1, 4):
        with PeakMemory() as memory:
            _, grads = SPSA(q=q)(f, params, batch)
            for name, p in params.items():
                grads[name].add_to_(p, alpha=-1e-3)
        # q = 1 draws one piece at a time when it updates, q > 1 two
        assert memory.peak <= max(inference.peak + one_tensor, in_float32 * min(q, 2)) + slack
        assert memory.peak < exact.peak / 2


# --- randomness and state -----------------------------------------------------------------------------------


def test_seeds_come_from_the_given_generator_else_from_its_own_and_successive_steps_differ():
    f, params, _, _ = quadratic([(5,)])
    given = [spsa(f, params, None, generator=seeded(1))[1]["p0"].terms for _ in range(2)]
    assert given[0] == given[1]
    estimator, twin, other = SPSA(seed=4), SPSA(seed=4), SPSA(seed=5)
    first, second = (estimator(f, params, None)[1]["p0"].terms for _ in range(2))
    assert first != second
    assert twin(f, params, None)[1]["p0"].terms == first
    assert other(f, params, None)[1]["p0"].terms != first
    assert estimator(f, params, None, generator=seeded(1))[1]["p0"].terms == given[0]
    torch.manual_seed(0)
    unseeded = spsa(f, params, None)[1]["p0"].terms
    torch.manual_seed(0)
    assert spsa(f, params, None)[1]["p0"].terms == unseeded


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    ({"mu": 0.0}, "mu must be a positive number, got 0.0"),
    ({"mu": -1e-3}, "mu must be a positive number, got -0.001"),
    ({"mu": math.nan}, "mu must be a positive number, got nan"),
    ({"q": 0}, "q must be a whole number of directions, at least 1, got 0"),
    ({"q": 1.5}, "q must be a whole number of directions, at least 1, got 1.5"),
    ({"sides": 3}, "sides must be 1 or 2, got 3"),
])  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    for call in (lambda: SPSA(**arguments), lambda: spsa(lambda p, _: p["w"].sum(), {"w": torch.ones(2)}, None, **arguments)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_said_as_value_error_and_as_divergence(sides, value):
    for kind in (ValueError, FloatingPointError):
        with pytest.raises(kind, match=f"the loss is {value}"):
            SPSA(sides=sides)(lambda p, _: p["w"].sum() * value, {"w": torch.ones(2)}, None)


def test_nothing_to_perturb_and_a_foreign_state_are_refused():
    with pytest.raises(ValueError, match="nothing to perturb"):
        SPSA()(lambda p, _: torch.zeros(()), {}, None)
    with pytest.raises(ValueError, match=r"the one entry 'generator', got \['momentum'\]"):
        SPSA().load_state_dict({"momentum": 1})
    with pytest.raises(ValueError, match=r"'steps' has dtype torch\.int64"):
        SPSA()(lambda p, _: p["steps"].sum().float(), {"steps": torch.ones(2, dtype=torch.long)}, None)
