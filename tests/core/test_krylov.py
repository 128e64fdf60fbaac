"""Oracles of Lanczos and its quadrature: numpy's eigenvalues, moments, and what must hold of every tridiagonalisation."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradwise.core.cost import PeakMemory
from gradwise.core.curvature import Matvec, hessian_operator, hvp
from gradwise.core.krylov import lanczos, stochastic_lanczos_quadrature
from gradwise.core.named_tensors import flatten
from gradwise.core.protocols import NamedTensors, loss_function, trainable


def _symmetric(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    m = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ((m + m.T) / 2).to(dtype)


def _named(vector: Tensor) -> NamedTensors:
    """The same vector as three tensors of odd shapes (the last a scalar)."""
    n = len(vector)
    return {"a": vector[: n // 2], "b": vector[n // 2 : n - 1].view(-1, 1), "c": vector[n - 1]}


def _product(matrix: Tensor) -> Matvec:
    return lambda v: _named(matrix @ flatten(v))


def _start(size: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> NamedTensors:
    return _named(torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype))


def test_all_steps_give_every_eigenvalue_and_vector() -> None:
    matrix = _symmetric(60)
    result = lanczos(_product(matrix), _start(60), 60, keep_basis=True)
    values, vectors = np.linalg.eigh(matrix.numpy())
    np.testing.assert_allclose(result.ritz_values().numpy(), values, atol=1e-9)
    rows = torch.stack([flatten({k: v[i] for k, v in result.ritz_vectors().items()}) for i in range(60)])
    np.testing.assert_allclose(np.abs(rows.numpy() @ vectors), np.eye(60), atol=1e-7)
    assert bool(result.exhausted)


def test_extremes_come_first_and_within_their_error_bound() -> None:
    matrix = _symmetric(200)
    values = np.linalg.eigvalsh(matrix.numpy())
    result = lanczos(_product(matrix), _start(200), 60)
    found = result.ritz_values().numpy()
    np.testing.assert_allclose(found[[0, -1]], values[[0, -1]], atol=1e-6)
    bounds = float(result.remainder) * torch.linalg.eigh(result.matrix())[1][-1].abs().numpy()
    nearest = np.abs(found[:, None] - values[None]).min(1)
    assert (nearest <= bounds + 1e-10).all()


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_the_three_term_recurrence_and_the_orthonormal_basis(reorthogonalize: bool) -> None:
    matrix, steps = _symmetric(40), 12
    result = lanczos(_product(matrix), _start(40), steps, keep_basis=True, reorthogonalize=reorthogonalize)
    assert result.basis is not None
    q = torch.stack([flatten({k: v[i] for k, v in result.basis.items()}) for i in range(steps)], 1)
    torch.testing.assert_close(q.T @ q, torch.eye(steps, dtype=q.dtype), atol=1e-10, rtol=0)
    residual = matrix @ q - q @ result.matrix()
    torch.testing.assert_close(residual[:, :-1], torch.zeros_like(residual[:, :-1]), atol=1e-10, rtol=0)
    torch.testing.assert_close(residual[:, -1].norm(), result.remainder)
    assert result.basis["b"].shape == (steps, 19, 1)
    assert result.basis["c"].shape == (steps,)


def test_reorthogonalisation_is_what_keeps_float32_free_of_ghosts() -> None:
    spectrum = torch.cat([torch.linspace(0, 1, 195), torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])])
    product: Matvec = lambda v: {"x": spectrum * v["x"]}  # noqa: E731
    start = {"x": torch.randn(200, generator=torch.Generator().manual_seed(0))}
    full, lean = (lanczos(product, start, 60, reorthogonalize=choice) for choice in (True, False))
    assert (full.ritz_values() > 5).sum() == 5
    assert (lean.ritz_values() > 5).sum() > 5
    # and yet the quadrature of the lean run is as good
    q = start["x"].double() / start["x"].double().norm()
    for f in (torch.sin, torch.square):
        exact = (q.square() * f(spectrum.double())).sum()
        nodes, weights = lean.quadrature()
        torch.testing.assert_close((weights * f(nodes)).sum(), exact, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 8))
def test_quadrature_is_exact_for_polynomials_of_degree_2m_minus_1(seed: int, steps: int) -> None:
    matrix, start = _symmetric(20, seed) / 5, _start(20, seed + 1)
    q = flatten(start) / flatten(start).norm()
    nodes, weights = lanczos(_product(matrix), start, steps).quadrature()
    power = q
    for degree in range(2 * steps):
        torch.testing.assert_close((weights * nodes**degree).sum(), q @ power, rtol=1e-7, atol=1e-9)
        power = matrix @ power


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_happy_breakdown_ends_early_with_exact_values(dtype: torch.dtype) -> None:
    basis = torch.linalg.qr(_symmetric(30))[0]
    matrix = (basis * torch.tensor([1.0, 2.0, 5.0]).repeat_interleave(10).double()) @ basis.T
    result = lanczos(_product(matrix.to(dtype)), _start(30, dtype=dtype), 20)
    assert result.diagonal.shape == (3,)
    assert bool(result.exhausted)
    assert float(result.remainder) == 0
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    expected = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(result.ritz_values(), expected, rtol=tolerance, atol=tolerance)


def test_the_zero_matrix_and_an_eigenvector_as_start() -> None:
    zero = lanczos(lambda v: {"x": 0 * v["x"]}, {"x": torch.ones(4)}, 3)
    assert zero.ritz_values().tolist() == [0.0]
    one = lanczos(lambda v: {"x": torch.tensor([3.0, 1.0]) * v["x"]}, {"x": torch.tensor([2.0, 0.0])}, 2)
    assert one.ritz_values().tolist() == [3.0]


def test_batched_runs_are_the_single_runs_even_when_they_end_at_different_steps() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.0, 4.0, 9.0, 16.0], dtype=torch.float64))
    starts = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 2, 3, 0, 0]], dtype=torch.float64)
    together = lanczos(lambda v: {"x": v["x"] @ matrix}, {"x": starts}, 5, batched=True, keep_basis=True)
    assert together.diagonal.shape == (3, 4)
    assert together.basis is not None
    assert together.basis["x"].shape == (3, 4, 5)
    nodes, weights = together.quadrature()
    for i, steps in enumerate((4, 1, 2)):
        alone = lanczos(lambda v: {"x": matrix @ v["x"]}, {"x": starts[i]}, 5)
        assert len(alone.diagonal) == steps
        torch.testing.assert_close(together.diagonal[i, :steps], alone.diagonal)
        for f in (torch.exp, torch.square, torch.ones_like):
            a, b = alone.quadrature()
            torch.testing.assert_close((weights[i] * f(nodes[i])).sum(), (b * f(a)).sum())
    assert together.exhausted.tolist() == [True, True, True]


def test_hermitian_matrices() -> None:
    m = torch.complex(_symmetric(20), _symmetric(20, 5).triu(1) - _symmetric(20, 5).triu(1).T)
    start = {"x": torch.randn(20, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))}
    result = lanczos(lambda v: {"x": m @ v["x"]}, start, 20)
    np.testing.assert_allclose(result.ritz_values().numpy(), np.linalg.eigvalsh(m.numpy()), atol=1e-9)


def test_bfloat16_vectors_are_orthogonalised_in_float32() -> None:
    spectrum = torch.arange(1.0, 9.0)
    result = lanczos(lambda v: {"x": spectrum.bfloat16() * v["x"]}, {"x": torch.ones(8, dtype=torch.bfloat16)}, 5)
    assert result.diagonal.dtype == torch.float32
    assert abs(float(result.ritz_values()[-1]) - 8) < 0.1


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("batched", [False, True])
def test_spectral_quadrature_gives_moments_within_its_own_error(distribution: str, batched: bool) -> None:
    matrix = _symmetric(50) / 5
    product: Matvec = (lambda v: {"x": v["x"] @ matrix}) if batched else (lambda v: {"x": matrix @ v["x"]})
    quadrature = stochastic_lanczos_quadrature(
        product, {"x": torch.zeros(50, dtype=torch.float64)}, 20, 60,
        generator=torch.Generator().manual_seed(0), distribution=distribution, batched=batched,
    )  # fmt: skip
    assert quadrature.nodes.shape == (60, 20)
    torch.testing.assert_close(quadrature.weights.sum(1), torch.ones(60, dtype=torch.float64))
    values = torch.linalg.eigvalsh(matrix)
    for f in (torch.square, torch.exp):
        found = quadrature.trace(f)
        assert abs(found.value - f(values).sum()) < 4 * found.standard_error
    assert quadrature.trace(torch.ones_like).value == pytest.approx(50)


def test_the_same_generator_gives_the_same_quadrature_batched_or_not() -> None:
    matrix, like = _symmetric(15), {"x": torch.zeros(15, dtype=torch.float64)}
    runs = [
        stochastic_lanczos_quadrature(product, like, 6, 3, generator=torch.Generator().manual_seed(7), batched=batched)
        for product, batched in (((lambda v: {"x": matrix @ v["x"]}), False), ((lambda v: {"x": v["x"] @ matrix}), True))
    ]
    torch.testing.assert_close(runs[0].nodes, runs[1].nodes)
    torch.testing.assert_close(runs[0].weights, runs[1].weights)


def test_probes_that_end_at_different_steps_are_padded_with_no_weight() -> None:
    spectrum = torch.tensor([1.0, 1.0, 3.0])
    quadrature = stochastic_lanczos_quadrature(lambda v: {"x": spectrum * v["x"]}, {"x": torch.zeros(3)}, 3, 4)
    assert quadrature.nodes.shape == (4, 2)
    assert quadrature.trace(torch.log).value.item() == pytest.approx(math.log(3), rel=1e-5)


def test_spectrum_of_a_million_parameters_within_12_copies_of_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(500, 1000), nn.Tanh(), nn.Linear(1000, 500, bias=False))
    params, batch = trainable(model), torch.randn(8, 500)
    copy = 4 * sum(p.numel() for p in params.values())
    # not mse_loss, whose forward mode crashes torch 2.13 under a dispatch mode such as PeakMemory
    loss_fn = loss_function(model, lambda m, x: m(x).square().mean())
    for product in (partial(hvp, loss_fn, params, batch), hessian_operator(loss_fn, params, batch)):
        with PeakMemory() as memory:
            quadrature = stochastic_lanczos_quadrature(product, params, 12, 2, reorthogonalize=False)
        assert memory.peak <= 12 * copy
        assert quadrature.nodes.isfinite().all()


def test_bad_arguments_are_named() -> None:
    identity: Matvec = lambda v: v  # noqa: E731
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        lanczos(identity, {"x": torch.ones(2)}, 0)
    with pytest.raises(ValueError, match=r"finite vector other than zero, got 2 entries of norm 0.0"):
        lanczos(identity, {"x": torch.zeros(2)}, 2)
    with pytest.raises(ValueError, match="0 entries"):
        lanczos(identity, {}, 2)
    with pytest.raises(ValueError, match="not finite"):
        lanczos(lambda v: {"x": v["x"] * math.nan}, {"x": torch.ones(2)}, 2)
    with pytest.raises(ValueError, match="'x' must have shape"):
        lanczos(lambda v: {"x": torch.ones(3)}, {"x": torch.ones(2)}, 2)
    with pytest.raises(ValueError, match="keep_basis"):
        lanczos(identity, {"x": torch.ones(2)}, 2).ritz_vectors()
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        stochastic_lanczos_quadrature(identity, {"x": torch.ones(2)}, 2, 0)
    with pytest.raises(ValueError, match='distribution must be "rademacher" or "normal", got \'uniform\''):
        stochastic_lanczos_quadrature(identity, {"x": torch.ones(2)}, 2, distribution="uniform")


