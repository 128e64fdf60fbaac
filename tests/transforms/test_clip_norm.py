"""Oracles of ClipNorm: torch's own clipping, and what clipping must not change."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradwise.core.cost import PeakMemory
from gradwise.core.seeded import SeededGradient
from gradwise.transforms import ClipNorm


def gradient(scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = {"weight": (7, 5), "bias": (7,), "gain": (), "empty": (0, 3)}
    return {name: (scale * torch.randn(shape, generator=g)).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("order", [1, 2, 3.5, math.inf])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_bit_for_bit(order, scale, dtype):
    grads = {name: g for name, g in gradient(scale, dtype).items() if g.numel()}  # torch's infinity norm refuses an empty tensor
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for p, g in zip(params, grads.values(), strict=True):
        p.grad = g.clone()
    total = nn.utils.clip_grad_norm_(params, 1.5, order)
    clip = ClipNorm(1.5, order)
    clipped = clip(grads, {})
    assert torch.equal(clip.last_norm, total)
    for p, g in zip(params, clipped.values(), strict=True):
        assert torch.equal(p.grad, g)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_does_as_torch_does(bad):
    grads = {"w": torch.tensor([1.0, bad]), "b": torch.tensor([2.0])}
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for p, g in zip(params, grads.values(), strict=True):
        p.grad = g.clone()
    nn.utils.clip_grad_norm_(params, 1.0)
    for p, g in zip(params, ClipNorm(1.0)(grads, {}).values(), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="norm of order 2"):
        ClipNorm(1.0, error_if_nonfinite=True)(grads, {})


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.floats(1e-3, 1e3))
def test_direction_stays_and_length_is_the_smaller_of_the_two(values, max_norm):
    g = torch.tensor(values, dtype=torch.float64)
    clipped = ClipNorm(max_norm)({"w": g}, {})["w"]
    length = float(g.norm())
    assert float(clipped.norm()) <= min(length, max_norm) * (1 + 1e-12)
    assert float(clipped.norm()) >= min(length, max_norm) * (length / (length + 1e-6)) * (1 - 1e-9)
    torch.testing.assert_close(clipped * length, g * clipped.norm(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_how_the_gradient_is_cut_into_tensors_does_not_matter(order):
    grads = gradient(dtype=torch.float64)
    whole = torch.cat([g.flatten() for g in grads.values()])
    parts = torch.cat([g.flatten() for g in ClipNorm(0.3, order)(grads, {}).values()])
    torch.testing.assert_close(parts, ClipNorm(0.3, order)({"all": whole}, {})["all"], rtol=1e-12, atol=0)


def test_the_norm_of_bfloat16_gradients_is_summed_in_float32():
    grads = {"w": torch.full((100_000,), 0.01, dtype=torch.bfloat16), "scalar": torch.tensor(1.0, dtype=torch.bfloat16)}
    clip = ClipNorm(math.inf)
    clip(grads, {})
    exact = math.sqrt(100_000 * float(grads["w"][0]) ** 2 + 1)
    assert float(clip.last_norm) == pytest.approx(exact, rel=2e-4)  # bfloat16 itself resolves 4e-3


def test_infinite_max_norm_only_measures_and_zero_stops():
    grads = gradient()
    for name, g in ClipNorm(math.inf)(grads, {}).items():
        assert torch.equal(g, grads[name])
    for g in ClipNorm(0.0)(grads, {}).values():
        assert not g.any()


def test_a_seeded_gradient_stays_lazy_and_is_scaled_as_its_tensor():
    lazy = SeededGradient("w", ((3, 2.0), (4, -1.0)), torch.Size([50]), torch.float32, torch.device("cpu"))
    clipped = ClipNorm(1.0)({"w": lazy}, {})["w"]
    assert isinstance(clipped, SeededGradient)
    assert [seed for seed, _ in clipped.terms] == [3, 4]
    torch.testing.assert_close(clipped.materialize(), ClipNorm(1.0)({"w": lazy.materialize()}, {})["w"])


def test_attached_it_holds_one_extra_tensor_at_a_time():
    params = [nn.Parameter(torch.zeros(1000)) for _ in range(20)]
    optimizer = torch.optim.SGD(params, lr=1.0, foreach=False)
    ClipNorm(1.0).attach(optimizer)
    for p in params:
        p.grad = torch.ones(1000)
    with PeakMemory() as memory:
        optimizer.step()
    assert memory.peak < 3 * 4000


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_bad_arguments_are_named(bad):
    with pytest.raises(ValueError, match="max_norm"):
        ClipNorm(bad)
    with pytest.raises(ValueError, match="order"):
        ClipNorm(1.0, order=bad)
    with pytest.raises(ValueError, match="order"):
        ClipNorm(1.0, order=0.5)
