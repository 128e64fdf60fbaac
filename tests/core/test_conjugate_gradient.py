"""Oracles of conjugate gradients: numpy's solutions, the theory's step counts, and honest reports where it cannot solve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradwise.core.conjugate_gradient import conjugate_gradient
from gradwise.core.curvature import Matvec
from gradwise.core.named_tensors import NamedTensors, flatten


def _definite(size: int, condition: float = 100.0, seed: int = 0) -> Tensor:
    """A symmetric matrix with eigenvalues log-spaced from 1 to `condition`."""
    m = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(m)[0]
    return (basis * torch.logspace(0, math.log10(condition), size, dtype=torch.float64)) @ basis.T


def _named(vector: Tensor) -> NamedTensors:
    return {"a": vector[:3], "b": vector[3:].view(-1, 1)}


def _product(matrix: Tensor) -> Matvec:
    return lambda v: _named(matrix @ flatten(v))


def _rhs(size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), size=st.integers(4, 30), condition=st.sampled_from([1.0, 30.0, 1e4]), directions=st.integers(1, 3)
)
def test_solutions_are_numpys(seed: int, size: int, condition: float, directions: int) -> None:
    matrix, b = _definite(size, condition, seed), _rhs(size, seed + 1)
    result = conjugate_gradient(_product(matrix), _named(b), tol=1e-11, max_iterations=20 * size, directions=directions)
    assert bool(result.converged), result.reason()
    np.testing.assert_allclose(flatten(result.solution).numpy(), np.linalg.solve(matrix.numpy(), b.numpy()), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(result.residual_norm, (b - matrix @ flatten(result.solution)).norm(), rtol=1e-3, atol=1e-13)


def test_k_distinct_eigenvalues_take_k_steps() -> None:
    basis = torch.linalg.qr(_definite(30))[0]
    matrix = (basis * torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64).repeat_interleave(10)) @ basis.T
    result = conjugate_gradient(_product(matrix), _named(_rhs(30)), tol=1e-10)
    assert result.iterations == 3
    assert result.reason() == "converged"


def test_each_step_minimises_over_the_krylov_space() -> None:
    matrix, b = _definite(20), _rhs(20)
    krylov = torch.stack([torch.linalg.matrix_power(matrix / 100, k) @ b for k in range(5)], 1)
    basis = torch.linalg.qr(krylov)[0]
    best = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
    result = conjugate_gradient(_product(matrix), _named(b), tol=0.0, max_iterations=5)
    torch.testing.assert_close(flatten(result.solution), best, rtol=1e-7, atol=1e-9)
    assert not bool(result.converged)
    assert "not converged after 5 iterations" in result.reason()


def test_a_perfect_preconditioner_takes_one_step_and_a_changing_one_still_converges() -> None:
    matrix, b = _definite(30, 1e6), _rhs(30)
    inverse = torch.linalg.inv(matrix)
    assert conjugate_gradient(_product(matrix), _named(b), tol=1e-8, preconditioner=_product(inverse)).iterations <= 2
    calls = []

    def changing(v: NamedTensors) -> NamedTensors:
        calls.append(1)
        scale = 1 + 0.3 * math.sin(len(calls))
        return _named(scale * torch.linalg.solve(matrix + (1 + len(calls) % 3) * torch.eye(30), flatten(v)))

    plain = conjugate_gradient(_product(matrix), _named(b), tol=1e-8, max_iterations=2000)
    helped = conjugate_gradient(_product(matrix), _named(b), tol=1e-8, max_iterations=2000, preconditioner=changing)
    assert bool(helped.converged)
    assert helped.iterations < plain.iterations / 2


def test_damping_and_warm_starts() -> None:
    matrix, b = _definite(12), _rhs(12)
    expected = torch.linalg.solve(matrix + 5 * torch.eye(12), b)
    result = conjugate_gradient(_product(matrix), _named(b), damping=5.0, tol=1e-10)
    torch.testing.assert_close(flatten(result.solution), expected)
    again = conjugate_gradient(_product(matrix), _named(b), damping=5.0, tol=1e-8, x0=result.solution)
    assert again.iterations == 0
    assert bool(again.converged)
    assert again.direction is None


@pytest.mark.parametrize("eigenvalues", [[-1.0, -2, -3, -4], [5.0, 4, 3, -1], [1.0, 1, 1, -1e-3]])
def test_negative_curvature_is_detected_and_shown(eigenvalues: list[float]) -> None:
    matrix = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))
    b = torch.tensor([1.0, 1, 1, 3], dtype=torch.float64)
    result = conjugate_gradient(_product(matrix), _named(b), tol=1e-10)
    assert bool(result.negative_curvature)
    assert not bool(result.converged)
    assert "negative curvature" in result.reason()
    assert result.direction is not None
    d = flatten(result.direction)
    assert d @ matrix @ d <= 1e-12
    assert flatten(result.solution).isfinite().all()
    # what was reached before is no worse than the start, in the quadratic that CG descends
    x = flatten(result.solution)
    assert 0.5 * x @ matrix @ x - b @ x <= 1e-12


def test_damping_beyond_the_negative_eigenvalue_makes_it_solvable() -> None:
    matrix = torch.diag(torch.tensor([5.0, 4, 3, -1], dtype=torch.float64))
    assert bool(conjugate_gradient(_product(matrix), _named(torch.ones(4).double()), damping=2.0).converged)


def test_singular_systems_converge_in_the_range_and_say_so_outside() -> None:
    matrix = torch.diag(torch.tensor([2.0, 1.0, 3.0, 0.0], dtype=torch.float64))
    inside = conjugate_gradient(_product(matrix), _named(torch.tensor([2.0, 1, 3, 0], dtype=torch.float64)), tol=1e-10)
    assert bool(inside.converged)
    assert flatten(inside.solution).tolist() == pytest.approx([1, 1, 1, 0])
    outside = conjugate_gradient(_product(matrix), _named(torch.ones(4, dtype=torch.float64)), tol=1e-10)
    assert not bool(outside.converged)
    assert flatten(outside.solution).isfinite().all()
    assert "positive definite" in outside.reason()


def test_a_right_hand_side_of_zero_is_solved_by_zero() -> None:
    result = conjugate_gradient(_product(_definite(5)), _named(torch.zeros(5, dtype=torch.float64)))
    assert (result.iterations, bool(result.converged), float(result.residual_norm)) == (0, True, 0.0)


def test_float32_claims_convergence_only_when_the_true_residual_agrees() -> None:
    matrix, b = _definite(60, 1e5).float(), _rhs(60).float()
    for tol in (1e-3, 1e-9):
        result = conjugate_gradient(_product(matrix), _named(b), tol=tol, max_iterations=3000)
        true = (b.double() - matrix.double() @ flatten(result.solution).double()).norm()
        assert float(true) == pytest.approx(float(result.residual_norm), rel=0.3, abs=1e-5)
        assert bool(result.converged) == (float(result.residual_norm) <= tol * float(b.norm()))
    assert not bool(result.converged)  # 1e-9 is beyond float32
    assert result.iterations < 3000  # and it stops when restarts no longer help


def test_nan_is_said_and_not_called_negative() -> None:
    result = conjugate_gradient(lambda v: {"x": v["x"] * math.nan}, {"x": torch.ones(3)})
    assert not bool(result.negative_curvature)
    assert not bool(result.converged)
    assert "not finite" in result.reason()


def test_batched_systems_are_the_single_systems() -> None:
    matrices = torch.stack([_definite(6, 10.0, seed) for seed in range(3)])
    matrices[2] = -matrices[2]
    b = torch.stack([_rhs(6, 10 + seed) for seed in range(3)])
    b[1] = 0
    together = conjugate_gradient(lambda v: {"x": (matrices @ v["x"].unsqueeze(-1)).squeeze(-1)}, {"x": b}, tol=1e-9, batched=True)
    assert together.converged.tolist() == [True, True, False]
    assert together.negative_curvature.tolist() == [False, False, True]
    assert together.residual_norm.shape == (3,)
    for i in range(3):
        alone = conjugate_gradient(lambda v, i=i: {"x": matrices[i] @ v["x"]}, {"x": b[i]}, tol=1e-9)
        torch.testing.assert_close(together.solution["x"][i], alone.solution["x"], rtol=1e-6, atol=1e-8)


def test_hermitian_systems() -> None:
    real, imaginary = _definite(8), _rhs(64).view(8, 8)
    matrix = torch.complex(real, 0.1 * (imaginary - imaginary.T))
    b = torch.complex(_rhs(8), _rhs(8, 2))
    result = conjugate_gradient(lambda v: {"x": matrix @ v["x"]}, {"x": b}, tol=1e-11)
    np.testing.assert_allclose(result.solution["x"].numpy(), np.linalg.solve(matrix.numpy(), b.numpy()), rtol=1e-7, atol=1e-9)


def test_it_is_the_solve_of_implicit_differentiation() -> None:
    """d/dtheta of x = (X^T X + theta I)^-1 X^T y is -(X^T X + theta I)^-1 x."""
    x, y, theta = _rhs(60).view(12, 5), _rhs(12, 3), 0.7
    gram = x.T @ x
    solve = lambda b: flatten(conjugate_gradient(_product(gram), _named(b), damping=theta, tol=1e-12).solution)  # noqa: E731
    derivative = -solve(solve(x.T @ y))
    ridge = lambda t: torch.linalg.solve(gram + t * torch.eye(5, dtype=torch.float64), x.T @ y)  # noqa: E731
    torch.testing.assert_close(derivative, (ridge(theta + 1e-5) - ridge(theta - 1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("argument", [{"tol": -1.0}, {"max_iterations": -1}, {"damping": -0.1}, {"directions": 0}])
def test_bad_arguments_are_named(argument: dict[str, float]) -> None:
    ((name, value),) = argument.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        conjugate_gradient(lambda v: v, {"x": torch.ones(2)}, **argument)
    with pytest.raises(ValueError, match="'x' must have shape"):
        conjugate_gradient(lambda v: v, {"x": torch.ones(2)}, x0={"x": torch.ones(3)})
