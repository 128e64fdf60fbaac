"""Oracles of GradientNoise: the closed form of its variance, the variance it gives SGD, and who sees which noise."""

import io
import math

import pytest
import torch
from torch import nn

from gradwise.core.compat import IncompatibleWords
from gradwise.core.seeded import SeededGradient
from gradwise.transforms import ClipNorm, GradientNoise, annealed_noise_std


def test_the_standard_deviation_is_the_closed_form():
    assert annealed_noise_std(0, eta=0.3, gamma=0.55) == math.sqrt(0.3)
    assert annealed_noise_std(1, eta=1.0, gamma=0.55) == pytest.approx(2**-0.275, rel=1e-15)
    # the counter of optax.add_noise stands at t + 1 when it draws, so its eta / count^gamma is the same sequence from the start
    for t in (0, 1, 9, 99):
        assert annealed_noise_std(t, eta=0.01, gamma=0.55) ** 2 == pytest.approx(0.01 / (t + 1) ** 0.55, rel=1e-14)
        assert annealed_noise_std(t, eta=0.01, gamma=0.0) == 0.1


@pytest.mark.parametrize("t", [0, 9, 99])
def test_a_million_draws_have_the_stated_variance_and_no_mean(t):
    noise = GradientNoise(eta=0.3, gamma=0.55, generator=1)
    noise.step = t
    n = noise({"w": torch.zeros(1_000_000, dtype=torch.float64)}, {})["w"]
    variance = 0.3 / (1 + t) ** 0.55
    assert float(n.var()) == pytest.approx(variance, rel=0.01)
    assert abs(float(n.mean())) < 4 * math.sqrt(variance / 1e6)
    assert noise.step == t + 1


def test_draws_are_independent_over_entries_tensors_and_steps():
    noise = GradientNoise(eta=1.0, gamma=0.0)
    zeros = {"a": torch.zeros(100_000), "b": torch.zeros(100_000)}
    first, second = noise(zeros, {}), noise(zeros, {})
    draws = torch.stack([first["a"], first["b"], second["a"], second["b"], first["a"].roll(1)])
    correlation = torch.corrcoef(draws) - torch.eye(5)
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(1e5)


def test_without_variance_nothing_changes_bit_for_bit():
    grads = {"w": torch.tensor([0.0, -0.0, 1e-45, 3.0]), "h": torch.tensor([1.5], dtype=torch.bfloat16)}
    noisy = GradientNoise(eta=0.0)(grads, {})
    for name, g in grads.items():
        assert torch.equal(noisy[name], g)
        assert torch.equal(noisy[name].signbit(), g.signbit())


def test_stationary_variance_of_sgd_on_a_quadratic():
    h, lr, variance = 0.8, 0.5, 0.3
    w = nn.Parameter(torch.zeros(50_000))
    optimizer = torch.optim.SGD([w], lr=lr)
    GradientNoise(eta=variance, gamma=0.0, generator=0).attach(optimizer)
    for _ in range(40):
        w.grad = h * w.detach()
        optimizer.step()
    assert float(w.detach().var()) == pytest.approx(lr * variance / (h * (2 - lr * h)), rel=0.05)


def train(seed, *, steps=6, resume_at=None, **options):
    """Weights after a few steps of Adam with noise; with `resume_at`, everything is saved, thrown away and loaded there."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    noise, optimizer = GradientNoise(eta=0.3, generator=seed), torch.optim.Adam(model.parameters(), lr=0.1, **options)
    noise.attach(optimizer)
    for t in range(steps):
        if t == resume_at:
            buffer = io.BytesIO()
            torch.save({"noise": noise.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
            saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
            noise, optimizer = GradientNoise(eta=0.3), torch.optim.Adam(model.parameters(), **options)
            noise.load_state_dict(saved["noise"])
            optimizer.load_state_dict(saved["optimizer"])
            noise.attach(optimizer)
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_same_seed_same_trajectory_in_every_mode_of_the_optimizer_and_after_resuming():
    reference = train(7)
    assert torch.equal(train(7), reference)
    assert not torch.equal(train(8), reference)
    assert torch.equal(train(torch.Generator().manual_seed(7)), reference)
    torch.testing.assert_close(train(7, foreach=True), train(7, foreach=False))
    for at in (0, 1, 4):
        assert torch.equal(train(7, resume_at=at), reference)


def test_ranks_that_share_the_seed_keep_equal_replicas_and_the_full_variance():
    means = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(3)), "b": torch.zeros(1000)}
    ranks = [GradientNoise(eta=1.0)({name: g.clone() for name, g in means.items()}, {}) for _ in range(2)]
    assert torch.equal(ranks[0]["w"], ranks[1]["w"])
    averaged = torch.stack([rank["b"] for rank in ranks]).mean(0)
    assert float(averaged.var()) == pytest.approx(1.0, rel=0.2)


def test_half_precision_gradients_get_float32_noise_rounded_once():
    g = {"w": torch.full((1000,), 1.0, dtype=torch.bfloat16)}
    wide = {"w": torch.full((1000,), 1.0)}
    low, high = GradientNoise(eta=0.01)(g, {})["w"], GradientNoise(eta=0.01)(wide, {})["w"]
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, high.to(torch.bfloat16))


def test_a_seeded_gradient_becomes_the_tensor_it_stands_for_plus_the_noise():
    lazy = SeededGradient("w", ((3, 2.0),), torch.Size([50]), torch.float32, torch.device("cpu"))
    noisy = GradientNoise(eta=0.3)({"w": lazy}, {})["w"]
    assert torch.equal(noisy, GradientNoise(eta=0.3)({"w": lazy.materialize()}, {})["w"])


def test_noise_after_clipping_is_not_shrunk_and_the_other_order_is_refused():
    w = nn.Parameter(torch.zeros(100_000))
    optimizer = torch.optim.SGD([w], lr=1.0)
    ClipNorm(1e-6).attach(optimizer)
    handle = GradientNoise(eta=1.0).attach(optimizer)
    w.grad = torch.ones(100_000)
    optimizer.step()
    assert float(w.detach().std()) == pytest.approx(1.0, rel=0.02)
    handle.remove()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    GradientNoise().attach(other)
    with pytest.raises(IncompatibleWords, match="GradientNoise cannot come before ClipNorm"):
        ClipNorm(1.0).attach(other)
    with pytest.raises(IncompatibleWords, match="LBFGS"):
        GradientNoise().attach(torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]))


def test_a_generator_on_another_device_is_refused_by_name():
    grads = {"w": torch.zeros(2), "elsewhere": torch.zeros(2, device="meta")}
    with pytest.raises(ValueError, match="generator is on cpu, but the gradient of 'elsewhere' is on meta"):
        GradientNoise(generator=torch.Generator())(grads, {})
    noise = GradientNoise(generator=0)
    with pytest.raises(ValueError, match="elsewhere"):
        noise(grads, {})
    assert noise.step == 0  # a refused step has not happened


def test_a_state_that_cannot_be_continued_is_refused():
    noise = GradientNoise()
    noise({"w": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="keys"):
        noise.load_state_dict({"step": 1})
    with pytest.raises(ValueError, match="cuda"):
        noise.load_state_dict({**noise.state_dict(), "device": "cuda:0"})
    assert noise.step == 1


@pytest.mark.parametrize("name", ["eta", "gamma"])
@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_bad_arguments_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        GradientNoise(**{name: bad})
    with pytest.raises(ValueError, match=name):
        annealed_noise_std(0, **{name: bad})


def test_bad_steps_and_generators_are_named():
    with pytest.raises(ValueError, match="step"):
        annealed_noise_std(-1)
    with pytest.raises(TypeError, match="generator"):
        GradientNoise(generator="seed")
