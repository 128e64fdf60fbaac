"""Hutchinson's estimators: the trace and the diagonal of a matrix from its products with random vectors.

If z has independent entries of mean 0 and variance 1, then E <z, A z> = tr A and E[z * A z] = diag A. Signs (Rademacher
entries) have the least variance among such z: only the off-diagonal part of A makes noise, and a diagonal matrix is seen
exactly by one probe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwise.core.curvature import Matvec
from gradwise.core.flat_vectors import Distribution, FlatVectors, inner, random_vector
from gradwise.core.protocols import NamedTensors


@dataclass(frozen=True)
class TraceEstimate:
    """A mean over random probes.

    Attributes:
        value: the estimate, 0-d.
        standard_error: of the mean, 0-d; nan with a single probe, which cannot tell its own error.
        samples: how many probes.

    Example:
        >>> estimate(torch.tensor([1.0, 3.0]))
        TraceEstimate(value=tensor(2.), standard_error=tensor(1.), samples=2)
    """

    value: Tensor
    standard_error: Tensor
    samples: int


def estimate(values: Tensor) -> TraceEstimate:
    """The mean of independent values (n,) with its standard error.

    Example:
        >>> estimate(torch.ones(4)).standard_error.item()
        0.0
    """
    n = len(values)
    error = values.std() / math.sqrt(n) if n > 1 else torch.full_like(values[0], math.nan)
    return TraceEstimate(values.mean(), error, n)


def hutchinson_trace(
    matvec: Matvec,
    like: NamedTensors,
    samples: int,
    *,
    generator: torch.Generator | None = None,
    distribution: Distribution = "rademacher",
) -> TraceEstimate:
    """tr A = E <z, A z> for random z of unit covariance, with its standard error.

    The variance of one sample is 2 (||A||_F^2 - sum_i A_ii^2) with signs and 2 ||A||_F^2 with normal entries (A symmetric).

    Args:
        matvec: A, square, not necessarily symmetric.
        like: names, shapes, dtypes and device of the vectors.
        samples: number of products, at least 1.
        generator, distribution: of the probes z.

    Raises:
        ValueError: samples < 1 or an unknown distribution.

    Example:
        >>> hutchinson_trace(lambda v: {"x": torch.tensor([1.0, 2.0]) * v["x"]}, {"x": torch.zeros(2)}, 8)
        TraceEstimate(value=tensor(3.), standard_error=tensor(0.), samples=8)

    Source: Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines".
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    vectors = FlatVectors(like)
    values = []
    for _ in range(samples):
        probe = random_vector(like, distribution, generator)
        values.append(inner(vectors.pack(probe), vectors.pack(matvec(probe))))
    return estimate(torch.stack(values))


def hutchinson_diagonal(
    matvec: Matvec,
    like: NamedTensors,
    samples: int,
    *,
    generator: torch.Generator | None = None,
    distribution: Distribution = "rademacher",
) -> NamedTensors:
    """diag A = E[z * A z] for random z with independent entries of unit variance, by name.

    The variance of entry i, with signs, is sum_{j != i} A_ij^2 a sample.

    Args:
        matvec, like, samples, generator, distribution: as in `hutchinson_trace`.

    Raises:
        ValueError: samples < 1 or an unknown distribution.

    Example:
        >>> hutchinson_diagonal(lambda v: {"x": torch.tensor([1.0, 2.0]) * v["x"]}, {"x": torch.zeros(2)}, 1)
        {'x': tensor([1., 2.])}

    Source: Bekas, Kokiopoulou, Saad 2007, "An estimator for the diagonal of a matrix".
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    vectors = FlatVectors(like)
    total: Tensor | float = 0.0
    for _ in range(samples):
        probe = random_vector(like, distribution, generator)
        total = vectors.pack(probe).mul_(vectors.pack(matvec(probe))).div_(samples).add_(total)
    assert isinstance(total, Tensor)
    return vectors.unpack(total)
