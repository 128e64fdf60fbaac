"""AdaBelief against closed forms, Adam, direct evaluation, and numbers computed once with the authors' code and with optax."""

import math

import pytest
import torch
from torch import nn

from gradwise.optim import AdaBelief

SHAPES = ((4, 3), (7,), (3, 2, 3, 3), (), (5, 6), (2, 3, 4))
PAPER = {"rectify": False, "weight_decouple": False, "eps": 1e-8}


def wave(shape, phase):
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 * i + phase).add(0.4 * torch.cos(2.3 * i * phase)).reshape(shape)


def gradient(w, k, t):
    """Of tensor k at step t; that of every other tensor is orthogonal to its rows, as if the weight were normalised."""
    g = wave(w.shape, 1.0 + 0.37 * k + 0.91 * t) + 0.3 * w
    if k % 2 == 0 and w.ndim > 1:
        rows, h = w.flatten(1), g.flatten(1)
        g = (h - rows * ((h * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True))).view_as(g)
    return g


def fingerprints_after_25_steps(**options):
    """One number a tensor, sensitive to every entry."""
    params = [nn.Parameter(wave(s, 0.5 + k)) for k, s in enumerate(SHAPES)]
    optimizer = AdaBelief(params, **options)
    for t in range(25):
        for k, p in enumerate(params):
            p.grad = gradient(p.detach(), k, t)
        optimizer.step()
    return [float((p.detach() * wave(p.shape, 3.0)).sum()) for p in params]


def run(gradients, start=0.0, **options):
    """The trajectory of one float64 coordinate, its start included."""
    w = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer, path = AdaBelief([w], **options), [start]
    for g in gradients:
        w.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        path.append(w.item())
    return path


# adabelief-pytorch 0.2.0, float64
OFFICIAL = [
    ({}, [-2.5841315723287, 1.3863713935464, 16.646834120248, 0.024655254337709, -1.0318298872675, -8.7230063034513]),
    (
        {"lr": 0.02, "eps": 1e-8, "weight_decouple": False, "rectify": False, "weight_decay": 0.05},
        [-2.6698042292706, 0.51974676959011, 14.917161804785, -0.12333084657627, -1.6539424846607, -7.1735534936852],
    ),
    (
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, "amsgrad": True, "rectify": False, "fixed_decay": True, "weight_decay": 0.01},
        [-2.265267243935, 0.26527874934823, 12.162181181146, -0.12352972577305, -1.321291313379, -5.5839964107437],
    ),
    (
        {"lr": 0.02, "amsgrad": True, "weight_decay": 0.1},
        [-2.6022321483082, 1.0527964046351, 15.626167996083, -0.012038448216025, -1.4007989533766, -8.2054681947077],
    ),
    (
        {"lr": 0.02, "degenerated_to_sgd": False},
        [-2.579830313204, 1.3541639337978, 16.645119516604, 0.017931270970049, -0.99795809582594, -8.628957490174],
    ),
    (
        {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3},
        [-2.7277066927726, 0.44078417416275, 15.890631729778, -0.11754531655205, -1.1891997840609, -7.0789855138442],
    ),
]
# optax 0.2.8, float64: optax.adabelief(0.02, b1=0.9, b2=0.99, eps=e, eps_root=e)
OPTAX = [
    (1e-8, [-2.9189199468765, 0.52934029461842, 15.847761061153, -0.12450514637959, -1.740815846869, -7.4433069771706]),
    (1e-3, [-2.8521010857817, 0.58629441570702, 15.995410538348, -0.1124798252521, -1.5824928238685, -7.507763391258]),
]


@pytest.mark.parametrize(("options", "expected"), OFFICIAL, ids=lambda o: str(o) if isinstance(o, dict) else "")
def test_as_the_authors_code(options, expected):
    assert fingerprints_after_25_steps(**options) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("eps", "expected"), OPTAX)
def test_as_optax(eps, expected):
    assert fingerprints_after_25_steps(lr=0.02, betas=(0.9, 0.99), eps=eps, rectify=False) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("g", [3.0, -0.02, 1e-3])
@pytest.mark.parametrize("eps", [1e-16, 1e-4])
def test_first_step_in_closed_form(g, eps):
    beta1, beta2, lr = 0.9, 0.999, 0.1
    expected = -lr * g / (math.sqrt(((1 - beta2) * beta1**2 * g**2 + eps) / (1 - beta2)) + eps)
    assert run([g], lr=lr, rectify=False, eps=eps)[1] == pytest.approx(expected, rel=1e-12)
    if eps < 1e-8:
        assert expected == pytest.approx(-lr * math.copysign(1, g) / beta1, rel=1e-5)


def test_without_a_memory_of_the_gradient_only_eps_is_left_in_the_variance():
    beta2, eps, lr = 0.999, 1e-8, 1e-3
    path, s = run([1.0, 0.5, -2.0], lr=lr, betas=(0.0, beta2), eps=eps, rectify=False), 0.0
    for t, g in enumerate([1.0, 0.5, -2.0], 1):
        s = beta2 * s + eps
        assert path[t] - path[t - 1] == pytest.approx(-lr * g / (math.sqrt(s / (1 - beta2**t)) + eps), rel=1e-9)


@pytest.mark.parametrize("g", [1.0, -30.0])
def test_a_constant_gradient_is_believed_more_and_more_while_adam_keeps_its_step(g):
    path = run([g] * 2000, lr=1e-3, rectify=False)
    adam = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer, adam_path = torch.optim.Adam([adam], lr=1e-3), [0.0]
    for _ in range(200):
        adam.grad = torch.full_like(adam, g)
        optimizer.step()
        adam_path.append(adam.item())
    for t, multiple in ((100, 5.0), (200, 7.2), (2000, 38.6)):
        assert abs(path[t] - path[t - 1]) / 1e-3 == pytest.approx(multiple, rel=0.02)
    assert abs(adam_path[200] - adam_path[199]) / 1e-3 == pytest.approx(1.0, rel=1e-6)


def test_the_prediction_error_uses_the_new_mean():
    # with the old mean the first error would be g instead of beta1 g
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    w.grad = torch.full_like(w, 2.0)
    optimizer = AdaBelief([w], eps=0.0)
    optimizer.step()
    assert optimizer.state[w]["exp_avg_var"].item() == pytest.approx(0.001 * (0.9 * 2.0) ** 2)


def test_eps_accumulates_in_the_state():
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdaBelief([w], eps=1e-3, betas=(0.9, 0.9))
    for _ in range(300):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert optimizer.state[w]["exp_avg_var"].item() == pytest.approx(1e-3 / (1 - 0.9))
    assert w.item() == 1.0


def rho(beta2, t):
    """By the definition: the length of the average that has the same centre of mass."""
    limit = 2 / (1 - beta2) - 1
    return limit - 2 * t * beta2**t / (1 - beta2**t)


def test_rectification_starts_at_the_sixth_step_and_equals_its_formula():
    assert rho(0.999, 5) < 5 <= rho(0.999, 6)
    g, eps, lr, beta1, beta2 = [1.0, 0.3, -0.5, 2.0, 1.0, 0.7, 0.9], 1e-8, 1e-3, 0.9, 0.999
    path = run(g, start=0.5, lr=lr, eps=eps)
    frozen = run(g, start=0.5, lr=lr, eps=eps, degenerated_to_sgd=False)
    assert frozen[:6] == [0.5] * 6
    m = s = 0.0
    for t, x in enumerate(g, 1):
        m = beta1 * m + (1 - beta1) * x
        s = beta2 * s + (1 - beta2) * (x - m) ** 2 + eps
        if t <= 5:
            change = -lr * m / (1 - beta1**t)
        else:
            r, limit = rho(beta2, t), 2 / (1 - beta2) - 1
            variance = (r - 4) * (r - 2) * limit / ((limit - 4) * (limit - 2) * r)
            change = -lr * math.sqrt((1 - beta2**t) * variance) / (1 - beta1**t) * m / (math.sqrt(s) + eps)
            assert frozen[t] - frozen[t - 1] == pytest.approx(change, rel=1e-9)
        assert path[t] - path[t - 1] == pytest.approx(change, rel=1e-9)


def test_a_short_memory_is_never_rectified():
    path = run([1.0] * 40, lr=1e-3, betas=(0.9, 0.6), degenerated_to_sgd=False)  # rho_infinity = 4
    assert path == [0.0] * 41


def test_weight_decay_in_its_three_forms():
    lr, wd = 0.1, 0.2
    assert run([0.0], start=2.0, lr=lr, weight_decay=wd)[1] == pytest.approx(2.0 * (1 - lr * wd))
    assert run([0.0], start=2.0, lr=lr, weight_decay=wd, fixed_decay=True)[1] == pytest.approx(2.0 * (1 - wd))
    coupled = run([1.0, 1.0], start=2.0, lr=lr, weight_decay=wd, **PAPER | {"eps": 1e-3})
    first = run([1.0 + wd * 2.0], start=2.0, lr=lr, **PAPER | {"eps": 1e-3})
    assert coupled[1] == pytest.approx(first[1], rel=1e-12)


def test_amsgrad_remembers_the_largest_variance_but_rectified_steps_do_not_use_it():
    g = [5.0, -5.0, 5.0, *[0.01] * 30]
    plain, capped = run(g, **PAPER), run(g, amsgrad=True, **PAPER)
    assert abs(capped[-1] - capped[-2]) < abs(plain[-1] - plain[-2])
    assert run(g, amsgrad=True) == run(g)


def test_options_may_differ_by_group():
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = AdaBelief([{"params": [a], "rectify": False, "amsgrad": True}, {"params": [b], "betas": (0.5, 0.9)}], lr=0.01)
    alone = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    separate = [AdaBelief([alone[0]], lr=0.01, rectify=False, amsgrad=True), AdaBelief([alone[1]], lr=0.01, betas=(0.5, 0.9))]
    for t in range(8):
        for p in (a, b, *alone):
            p.grad = torch.tensor([math.sin(t), 1.0], dtype=torch.float64)
        for o in (optimizer, *separate):
            o.step()
    assert torch.equal(a, alone[0])
    assert torch.equal(b, alone[1])
    assert "max_exp_avg_var" in optimizer.state[a]
    assert "max_exp_avg_var" not in optimizer.state[b]


@pytest.mark.parametrize("flat", [False, True])
def test_a_checkpoint_brings_its_own_amsgrad(flat):
    # as with every torch optimizer, options are loaded with the state: here they ask for one state more than the optimizer was built with
    def fresh(**options):
        w = nn.Parameter(torch.ones(3))
        return w, AdaBelief([w], lr=0.01, **PAPER, **options)

    def go(w, optimizer, steps):
        for t in steps:
            w.grad = torch.tensor([math.sin(3.0 * t), 1.0, -t])
            optimizer.step()
        return w.detach().clone()

    w, optimizer = fresh(amsgrad=True)
    middle = go(w, optimizer, range(3))
    saved = optimizer.state_dict()
    v, resumed = fresh(flat=flat)
    go(v, resumed, range(1))
    with torch.no_grad():
        v.copy_(middle)
    resumed.load_state_dict(saved)
    assert torch.equal(go(v, resumed, range(3, 6)), go(w, optimizer, range(3, 6)))


def test_the_noisy_coordinate_is_treated_as_by_adam_and_the_predictable_one_is_not():
    # the mechanism of the paper's figure 2: same E[g^2], constant or pure noise
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 400, generator=generator, dtype=torch.float64)
    steps = {}
    for name, cls, options in (("adabelief", AdaBelief, {"rectify": False}), ("adam", torch.optim.Adam, {})):
        w = nn.Parameter(torch.zeros(2, 400, dtype=torch.float64))
        optimizer = cls([w], lr=1e-3, **options)
        for t in range(200):
            before = w.detach().clone()
            w.grad = torch.stack([torch.ones(400, dtype=torch.float64), noise[t]])
            optimizer.step()
        steps[name] = (w.detach() - before).abs().mean(1)
    ratio = steps["adabelief"] / steps["adam"]
    assert ratio[0] > 5
    assert 1 <= ratio[1] <= 1.2
