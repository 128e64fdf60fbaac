"""AdamP and SGDP against torch's AdamW and SGD, geometry, and numbers computed once with the authors' code."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradwise.optim import SGDP, AdamP, radial_projection

SHAPES = ((4, 3), (7,), (3, 2, 3, 3), (), (5, 6), (2, 3, 4))


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


def train(optimizer_of, steps=25, shapes=SHAPES, dtype=torch.float64):
    params = [nn.Parameter(wave(s, 0.5 + k).to(dtype)) for k, s in enumerate(shapes)]
    optimizer = optimizer_of(params)
    for t in range(steps):
        for k, p in enumerate(params):
            p.grad = gradient(p.detach(), k, t).to(dtype)
        optimizer.step()
    return params


# adamp 0.3.0, float64. The last two of SGDP with `buf.clone()` for `buf`: without Nesterov that code projects the momentum buffer in place.
OFFICIAL = [
    (
        AdamP,
        {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1},
        [-2.7232342441561, 1.0093167111981, 16.268692145915, -0.040972391975416, -1.3286363072847, -7.9727789248936],
    ),
    (
        AdamP,
        {"lr": 0.02, "nesterov": True, "weight_decay": 0.1, "wd_ratio": 0.5, "eps": 1e-3},
        [-2.8252099188513, 0.57693140575703, 15.387925153021, -0.11304126610399, -1.8590369000214, -7.227665030098],
    ),
    (
        AdamP,
        {"lr": 0.02, "delta": 5.0, "weight_decay": 0.2},
        [-2.8250862447189, 0.59773956098639, 15.666045192918, -0.10153519859132, -1.6319494843408, -8.8584213954751],
    ),
    (
        SGDP,
        {"lr": 0.02, "weight_decay": 0.1},
        [-2.5915711470772, 0.68170985783609, 16.092605279915, -0.066426458633812, -0.92383529105128, -7.0377775132867],
    ),
    (
        SGDP,
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        [-2.6812906351567, -0.71420701453534, 14.4048658732, -0.28712539533493, -0.85729842087108, -4.2724321941985],
    ),
    (
        SGDP,
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05, "nesterov": True, "delta": 3.0, "eps": 1e-3},
        [-2.6328537086936, -0.27528099687689, 15.107751014513, -0.21478419571997, -0.89370289659187, -7.4309003255047],
    ),
    (
        SGDP,
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.05},
        [-2.6951529679084, -0.6586774720382, 14.524768556075, -0.28377578464743, -0.83461283615831, -4.44729175599],
    ),
    (
        SGDP,
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.05, "dampening": 0.4},
        [-2.6221552318503, 0.025903004090484, 15.538923280584, -0.17135087438337, -0.91451804330772, -5.7790726267817],
    ),
]


@pytest.mark.parametrize(("cls", "options", "expected"), OFFICIAL)
def test_as_the_authors_code(cls, options, expected):
    params = train(lambda p: cls(p, **options))
    assert [float((p.detach() * wave(p.shape, 3.0)).sum()) for p in params] == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_tolerance_it_is_adamw(weight_decay):
    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": weight_decay}
    for a, b in zip(train(lambda p: AdamP(p, delta=0.0, **options)), train(lambda p: torch.optim.AdamW(p, **options)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_tolerance_it_is_sgd(nesterov):
    options = {"lr": 0.01, "momentum": 0.9, "nesterov": nesterov}
    for a, b in zip(train(lambda p: SGDP(p, delta=0.0, **options)), train(lambda p: torch.optim.SGD(p, **options)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", ["loop", "foreach"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_and_scalars_get_adamw_to_the_bit(mode, flat, dtype):
    shapes, options = ((7,), (), (300,), (1,)), {"lr": 0.01, "weight_decay": 0.1}
    ours = train(lambda p: AdamP(p, mode=mode, flat=flat, **options), shapes=shapes, dtype=dtype)
    theirs = train(lambda p: torch.optim.AdamW(p, foreach=False, **options), shapes=shapes, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 3), (2, 3, 4)])
def test_a_step_that_is_always_projected_is_tangential_and_grows_norms_by_pythagoras(shape):
    w = nn.Parameter(wave(shape, 1.0))
    plain = nn.Parameter(w.detach().clone())
    projected, free = AdamP([w], lr=0.1, delta=1e9), AdamP([plain], lr=0.1, delta=0.0)
    w.grad = plain.grad = wave(shape, 2.0)
    before = w.detach().clone()
    projected.step()
    free.step()
    step, rows = (w.detach() - before).flatten(1), before.flatten(1)
    inner = (step * rows).sum(1) / (step.norm(dim=1) * rows.norm(dim=1))
    assert inner.abs().max() < 1e-7  # eps in the normalised weight leaves about 2 eps / ||w||
    torch.testing.assert_close(w.detach().flatten(1).square().sum(1), rows.square().sum(1) + step.square().sum(1), rtol=1e-7, atol=0)
    u = (plain.detach() - before).flatten(1)
    torch.testing.assert_close(step, u - rows * ((u * rows).sum(1) / rows.square().sum(1)).unsqueeze(1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("whole", [False, True], ids=["each row", "the whole layer"])
def test_a_scale_invariant_loss_is_detected_and_a_quadratic_is_not(whole):
    w = nn.Parameter(wave((5, 8), 0.3))
    target = wave((5, 8), 4.0)

    def invariant():
        direction = w / w.norm() if whole else w / w.norm(dim=1, keepdim=True)
        return (direction - target).square().sum()

    def radial(loss):
        (g,) = torch.autograd.grad(loss, w)
        update = wave((5, 8), 2.0)
        return *radial_projection(w.detach(), g, update), update

    new, projected, update = radial(invariant())
    assert projected
    if whole:  # rows alone are not orthogonal, the layer as one vector is
        assert abs(float((new * w.detach()).sum())) < 1e-6
        assert (new * w.detach()).sum(1).abs().max() > 1e-3
    else:
        assert (new * w.detach()).sum(1).abs().max() < 1e-6
    new, projected, update = radial((w - target).square().sum())
    assert not projected
    assert torch.equal(new, update)


def test_one_row_that_fails_rejects_the_rows_for_all():
    w = torch.eye(3, dtype=torch.float64)
    g = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.2]], dtype=torch.float64)
    u = torch.ones(3, 3, dtype=torch.float64)
    new, projected = radial_projection(w, g, u)  # the cosine of the whole layer, 0.08, is above 0.1 / 3
    assert not projected
    assert torch.equal(new, u)
    new, projected = radial_projection(w, g, u, delta=0.3)  # now below 0.3 / 3, while the last row's, 1, is not below 0.3 / sqrt 3
    assert projected
    torch.testing.assert_close(new, u - w * (3 / 3), rtol=1e-6, atol=1e-6)
    assert not radial_projection(w, w * 0, u, delta=0.0)[1]  # the comparison is strict


def test_dead_channels_pass_and_give_no_nan():
    for eps in (1e-8, 0.0):
        w, g, u = torch.ones(3, 4), torch.zeros(3, 4), torch.ones(3, 4)
        w[0] = 0.0
        g[1] = torch.tensor([1.0, -1.0, 0.0, 0.0])
        new, projected = radial_projection(w, g, u, eps=eps)
        assert projected
        assert torch.equal(new[0], u[0])  # no direction to remove
        assert new[1:].abs().max() < 1e-6
        assert new.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_extreme_norms_neither_overflow_nor_underflow(scale):
    w, g, u = torch.ones(2, 3) * scale, torch.tensor([[1.0, -1.0, 0.0]] * 2), torch.tensor([[1.0, 2.0, 3.0]] * 2)
    new, projected = radial_projection(w, g * scale, u, eps=0.0)
    assert new.isfinite().all()
    if 1e-20 < scale < 1e20:  # beyond, float32 cannot hold the squares
        assert projected
        torch.testing.assert_close(new, u - 2.0)


def test_decay_is_reduced_where_projected_and_scaled_by_momentum():
    lr, wd, ratio, mu = 0.1, 0.2, 0.25, 0.9
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    for orthogonal in (True, False):
        g = torch.tensor([[4.0, -3.0]] if orthogonal else [[1.0, 1.0]], dtype=torch.float64)
        p = nn.Parameter(w.clone())
        p.grad = g
        SGDP([p], lr=lr, momentum=mu, weight_decay=wd, wd_ratio=ratio).step()
        torch.testing.assert_close(p.detach(), w * (1 - lr * wd * (ratio if orthogonal else 1) / (1 - mu)) - lr * g, rtol=1e-9, atol=0)


def test_the_momentum_itself_is_not_projected():
    p = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = SGDP([p], lr=0.1, momentum=0.5)
    p.grad = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    optimizer.step()
    tangent = torch.tensor([[-1.0, 1.0]], dtype=torch.float64) * p.detach().flip(1)  # so that this update is projected
    p.grad = tangent
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum"], 0.5 * torch.ones(1, 2, dtype=torch.float64) + tangent)


@pytest.mark.parametrize("cls", [AdamP, SGDP])
def test_norms_of_normalised_weights_grow_less(cls):
    # the paper's mechanism: momentum inflates a weight whose norm does not matter
    norms = []
    for delta in (0.1, 0.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 1))
        options = {"lr": 0.05} if cls is AdamP else {"lr": 0.1, "momentum": 0.9}
        optimizer = cls(model.parameters(), delta=delta, **options)
        x = torch.randn(64, 10)
        y = x[:, :1] * x[:, 1:2]
        for _ in range(60):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        norms.append(float(model[0].weight.detach().norm()))
    assert norms[0] < 0.9 * norms[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6), st.floats(0.01, 100.0))
def test_projection_is_idempotent_blind_to_the_weights_scale_and_linear(rows, columns, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    w, g, u, v = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(4))
    w = w + 0.1 * w.sign()
    once, passed = radial_projection(w, g, u, delta=1e9, eps=1e-14)
    assert passed
    torch.testing.assert_close(radial_projection(w, g, once, delta=1e9, eps=1e-14)[0], once, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(radial_projection(scale * w, g, u, delta=1e9, eps=1e-14)[0], once, rtol=1e-8, atol=1e-8)
    both = radial_projection(w, g, u + 2 * v, delta=1e9, eps=1e-14)[0]
    torch.testing.assert_close(both, once + 2 * radial_projection(w, g, v, delta=1e9, eps=1e-14)[0], rtol=1e-8, atol=1e-8)
    assert (once.norm(dim=1) <= u.norm(dim=1) * (1 + 1e-9)).all()


def test_vectors_are_refused_by_the_function():
    with pytest.raises(ValueError, match=r"two or more dimensions.*\(3,\)"):
        radial_projection(torch.ones(3), torch.ones(3), torch.ones(3))


def test_sgdp_refuses_a_momentum_of_one():
    with pytest.raises(ValueError, match="momentum must be in"):
        SGDP([nn.Parameter(torch.ones(2))], lr=0.1, momentum=1.0, weight_decay=0.1)
