"""Lion against closed forms, identities, and numbers computed once with the authors' file and with optax."""

import math

import pytest
import torch
from torch import nn

from gradwise.optim import Lion

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


def train(optimizer_of, steps=25, scale=1.0):
    params = [nn.Parameter(wave(s, 0.5 + k)) for k, s in enumerate(SHAPES)]
    optimizer = optimizer_of(params)
    for t in range(steps):
        for k, p in enumerate(params):
            p.grad = scale * gradient(p.detach(), k, t)
        optimizer.step()
    return params, optimizer


# the first three: google/automl lion_pytorch.py; the last: optax.lion 0.2.8; all float64
REFERENCE = [
    ({"lr": 0.01}, [-2.6652369197108, 0.92927184237901, 15.922646066594, -0.065358221140904, -1.0894776049668, -7.7539400857171]),
    (
        {"lr": 0.02, "betas": (0.95, 0.98), "weight_decay": 0.3},
        [-2.5391907627159, 0.025411725742882, 12.905820352875, -0.20995962559604, -1.3081906180516, -4.8392613016363],
    ),
    (
        {"lr": 0.03, "betas": (0.0, 0.5)},
        [-2.8960870138834, 0.68589304196452, 15.334709549453, -0.054535820979707, -1.357552201218, -7.4602187277842],
    ),
    (
        {"lr": 0.02, "weight_decay": 0.1},
        [-2.6687472440388, 0.40998026094797, 14.458873740723, -0.13418175213193, -1.255508527697, -6.4942538195506],
    ),
]


@pytest.mark.parametrize(("options", "expected"), REFERENCE, ids=lambda o: str(o) if isinstance(o, dict) else "")
def test_as_the_authors_file_and_optax(options, expected):
    params, _ = train(lambda p: Lion(p, **options))
    # one flipped sign would change a number by about lr
    assert [float((p.detach() * wave(p.shape, 3.0)).sum()) for p in params] == pytest.approx(expected, rel=1e-12)


BY_HAND = [{"lr": 0.01}, {"lr": 0.02, "betas": (0.8, 0.8), "weight_decay": 0.2}, {"lr": 0.02, "betas": (0.0, 0.9)}]


@pytest.mark.parametrize("options", BY_HAND)
def test_by_hand_to_the_last_bit(options):
    ours, _ = train(lambda p: Lion(p, **options), steps=10)
    (beta1, beta2), lr, wd = options.get("betas", (0.9, 0.99)), options["lr"], options.get("weight_decay", 0.0)
    for k, s in enumerate(SHAPES):
        w, m = wave(s, 0.5 + k), torch.zeros(s, dtype=torch.float64)
        for t in range(10):
            g = gradient(w, k, t)
            w = w * (1 - lr * wd) - lr * torch.sign(beta1 * m + (1 - beta1) * g)
            m = beta2 * m + (1 - beta2) * g
        assert torch.equal(ours[k], w)


def test_every_coordinate_moves_by_lr():
    for wd in (0.0, 0.3):
        w = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        optimizer = Lion([w], lr=0.01, weight_decay=wd)
        for t in range(5):
            before = w.detach().clone()
            w.grad = torch.randn(1000, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            optimizer.step()
            torch.testing.assert_close((w.detach() - before * (1 - 0.01 * wd)).abs(), torch.full_like(w, 0.01), rtol=1e-12, atol=1e-14)


def test_without_momentum_in_the_update_it_is_sign_descent():
    w, v = (nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    optimizer = Lion([w], lr=0.1, betas=(0.0, 0.99))
    for t in range(5):
        w.grad = torch.tensor([math.sin(t + 1.0), -1.0, 1e-8])
        optimizer.step()
        with torch.no_grad():
            v -= 0.1 * w.grad.sign()
    assert torch.equal(w, v)


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_the_trajectory_does_not_depend_on_the_scale_of_the_gradient(scale):
    for a, b in zip(train(Lion)[0], train(Lion, scale=scale)[0], strict=True):
        assert torch.equal(a, b)


def test_the_sign_uses_the_old_momentum_and_beta1_and_the_state_beta2():
    # a second gradient on which they disagree: with the old m = 0.01, 0.9 m - 0.1 * 0.0892 > 0; with the new m, 0.009008, it is < 0
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Lion([w], lr=1.0)
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert w.item() == -1.0
    assert optimizer.state[w]["exp_avg"].item() == pytest.approx(0.01)
    w.grad = torch.full_like(w, -0.0892)
    optimizer.step()
    assert w.item() == -2.0
    assert optimizer.state[w]["exp_avg"].item() == pytest.approx(0.0099 - 0.000892)


def test_zero_is_neither_positive_nor_negative():
    w = nn.Parameter(torch.zeros(3))
    w.grad = torch.tensor([0.0, -0.0, 1.0])
    Lion([w], lr=0.1).step()
    assert w.tolist() == pytest.approx([0.0, 0.0, -0.1])


def test_tiny_half_precision_gradients_do_not_stop_a_coordinate():
    w = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    w.grad = torch.full_like(w, 6e-8)  # the smallest half: a tenth of it would be zero
    Lion([w], lr=0.5).step()
    assert w.item() == -0.5


def test_it_minimises_within_its_box_of_radius_one_over_weight_decay():
    # the fixed point of sign(c) + wd w = 0 lies in [-1 / wd, 1 / wd]: a far minimum is cut off at the box, a near one is reached
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = Lion([w], lr=0.01, weight_decay=0.5)
    target = torch.tensor([10.0, 0.5], dtype=torch.float64)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 3000)
    for _ in range(2999):
        w.grad = w.detach() - target
        optimizer.step()
        schedule.step()
    assert w.tolist() == pytest.approx([2.0, 0.5], abs=2e-3)


def test_its_state_is_half_of_adams():
    w = nn.Parameter(torch.zeros(1000))
    w.grad = torch.ones(1000)
    ours, adam = Lion([w]), torch.optim.AdamW([w])
    for optimizer in (ours, adam):
        optimizer.step()
    size = [sum(v.numel() * 4 for v in o.state[w].values() if torch.is_tensor(v) and v.ndim) for o in (ours, adam)]
    assert size == [4000, 8000]
