"""Oracles of Hutchinson's estimators: unbiased within their own error, of known variance, exact where theory says so."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradwise.core.curvature import Matvec
from gradwise.core.flat_vectors import FlatVectors, random_vector
from gradwise.core.hutchinson import hutchinson_diagonal, hutchinson_trace

LIKE = {"a": torch.zeros(5, dtype=torch.float64), "b": torch.zeros(3, 1, dtype=torch.float64)}


def _matrix(symmetric: bool = True) -> Tensor:
    m = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (m + m.T) / 2 if symmetric else m


def _product(matrix: Tensor) -> Matvec:
    vectors = FlatVectors(LIKE)
    return lambda v: vectors.unpack(matrix @ vectors.pack(v))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_the_trace_is_unbiased_and_its_error_is_the_known_one(distribution: str, symmetric: bool) -> None:
    matrix, samples = _matrix(symmetric), 2000
    found = hutchinson_trace(_product(matrix), LIKE, samples, generator=torch.Generator().manual_seed(1), distribution=distribution)
    assert abs(found.value - matrix.trace()) < 4 * found.standard_error
    even = (matrix + matrix.T) / 2
    variance = 2 * (even.square().sum() - (even.diagonal().square().sum() if distribution == "rademacher" else 0))
    torch.testing.assert_close(found.standard_error, (variance / samples).sqrt(), rtol=0.1, atol=0)
    assert found.samples == samples


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_the_diagonal_is_unbiased(distribution: str) -> None:
    matrix, samples = _matrix(), 2000
    found = FlatVectors(LIKE).pack(
        hutchinson_diagonal(_product(matrix), LIKE, samples, generator=torch.Generator().manual_seed(1), distribution=distribution)
    )
    off = matrix.square().sum(1) - matrix.diagonal().square()
    variance = off if distribution == "rademacher" else off + 2 * matrix.diagonal().square()
    assert ((found - matrix.diagonal()).abs() < 4 * (variance / samples).sqrt()).all()


def test_signs_see_a_diagonal_matrix_exactly() -> None:
    diagonal = torch.arange(8.0, dtype=torch.float64)
    product = _product(torch.diag(diagonal))
    assert hutchinson_trace(product, LIKE, 3).value.item() == 28
    assert hutchinson_trace(product, LIKE, 3).standard_error.item() == 0
    assert torch.equal(FlatVectors(LIKE).pack(hutchinson_diagonal(product, LIKE, 1)), diagonal)


def test_one_sample_does_not_know_its_error() -> None:
    assert math.isnan(hutchinson_trace(_product(_matrix()), LIKE, 1).standard_error.item())


def test_the_same_generator_gives_the_same_estimate_and_the_global_one_is_left_alone() -> None:
    product = _product(_matrix())
    state = torch.random.get_rng_state()
    values = [hutchinson_trace(product, LIKE, 4, generator=torch.Generator().manual_seed(3)).value for _ in range(2)]
    assert values[0] == values[1]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bfloat16_probes_are_summed_in_float32() -> None:
    like = {"x": torch.zeros(1000, dtype=torch.bfloat16)}
    found = hutchinson_trace(lambda v: v, like, 2)
    assert found.value.dtype == torch.float32
    assert found.value.item() == 1000
    assert hutchinson_diagonal(lambda v: v, like, 3)["x"].dtype == torch.bfloat16


def test_probes_have_mean_zero_and_unit_variance() -> None:
    for distribution in ("rademacher", "normal"):
        draw = random_vector({"x": torch.zeros(40_000)}, distribution, torch.Generator().manual_seed(0))["x"]
        assert abs(draw.mean()) < 4 / 200
        assert abs(draw.var() - 1) < 4 * math.sqrt(2) / 200


def test_bad_arguments_are_named() -> None:
    for call in (hutchinson_trace, hutchinson_diagonal):
        with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
            call(_product(_matrix()), LIKE, 0)
        with pytest.raises(ValueError, match='got \'uniform\''):
            call(_product(_matrix()), LIKE, 1, distribution="uniform")
