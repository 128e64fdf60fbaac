"""Conjugate gradients: solve A x = b for a symmetric positive definite matrix from products with it.

Each step goes along a new direction d, A-orthogonal to the earlier ones, to the minimum of x -> <x, A x>/2 - <b, x> on that
line, so that k steps minimise over the whole Krylov space. The flexible form used here makes d from the preconditioned
residual z by subtracting its A-projection on the last direction(s), which equals the textbook recursion for a fixed
preconditioner and stays right when the preconditioner changes from step to step or is nonlinear (a network).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwise.core.curvature import Matvec
from gradwise.core.flat_vectors import FlatVectors, inner
from gradwise.core.protocols import NamedTensors


@dataclass(frozen=True)
class LinearSolution:
    """What a linear solver found, and how far to trust it. Tensors are 0-d, or (B,) for B systems at once.

    Attributes:
        solution: x by name.
        residual_norm: ||b - A x||, computed from the solution at the end and not from the recursion, which drifts.
        iterations: steps taken; one product each, and at least one more for the residual.
        converged: whether residual_norm <= tol ||b||.
        negative_curvature: whether a direction with <d, A d> <= 0 (up to rounding) was met: A is not positive definite. The
            solution is the one before that direction.
        direction: the last direction d by name (where curvature is negative, the direction that showed it), or None if no step
            was taken.

    Example:
        >>> result = conjugate_gradient(lambda v: {"x": -v["x"]}, {"x": torch.ones(2)})
        >>> result.reason()
        'negative curvature: the matrix is not positive definite'
    """

    solution: NamedTensors
    residual_norm: Tensor
    iterations: int
    converged: Tensor
    negative_curvature: Tensor
    direction: NamedTensors | None

    def reason(self) -> str:
        """Why the iteration ended, in words.

        Example:
            >>> conjugate_gradient(lambda v: v, {"x": torch.ones(2)}).reason()
            'converged'
        """
        if bool(self.negative_curvature.any()):
            return "negative curvature: the matrix is not positive definite"
        if bool(self.converged.all()):
            return "converged"
        if not bool(self.residual_norm.isfinite().all()):
            return "not finite: the product or the right-hand side has nan or inf entries, or the iteration overflowed"
        return f"not converged after {self.iterations} iterations: raise max_iterations or tol, add damping or a preconditioner"


def conjugate_gradient(
    matvec: Matvec,
    b: NamedTensors,
    *,
    x0: NamedTensors | None = None,
    tol: float = 1e-5,
    max_iterations: int = 100,
    preconditioner: Matvec | None = None,
    damping: float = 0.0,
    directions: int = 1,
    batched: bool = False,
) -> LinearSolution:
    """Solve (A + damping I) x = b for symmetric (or Hermitian) positive definite A + damping I.

        d = z - sum_j d_j <A d_j, z> / <d_j, A d_j>;  x += d <d, r> / <d, A d>;  r = b - A x;  z = preconditioner(r)

    Never raises for want of convergence: look at `converged` and `reason()`. Semidefinite systems converge when b lies in the
    range of A. When the recursion believes it has converged the true residual is computed, and the iteration restarts from it as
    long as that helps, so that `converged` means what it says in float32 too.

    Args:
        matvec: A; with `batched`, of vectors whose first dimension counts the systems.
        b: the right-hand side by name.
        x0: where to start (0 by default).
        tol: on ||b - A x|| / ||b||.
        max_iterations: at least 0.
        preconditioner: an approximation of (A + damping I)^{-1}, as a product or any function of the residual.
        damping: >= 0, added to the diagonal.
        directions: how many earlier directions each new one is made A-orthogonal to, at least 1; more helps only with a
            preconditioner that changes, or rounding.
        batched: B independent systems along the first dimension of every tensor, each with its own step sizes and its own end.

    Raises:
        ValueError: tol < 0, max_iterations < 0, damping < 0, directions < 1, or names or shapes that differ from b's.

    Example:
        >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> result = conjugate_gradient(lambda v: {"x": matrix @ v["x"]}, {"x": torch.tensor([1.0, 2.0])})
        >>> result.solution["x"], result.iterations, bool(result.converged)
        (tensor([0.0909, 0.6364]), 2, True)

    Source: Hestenes and Stiefel 1952; Notay 2000, "Flexible conjugate gradients".
    """
    if tol < 0 or max_iterations < 0 or damping < 0 or directions < 1:
        raise ValueError(
            "conjugate_gradient needs tol >= 0, max_iterations >= 0, damping >= 0 and directions >= 1, "
            f"got tol={tol}, max_iterations={max_iterations}, damping={damping}, directions={directions}"
        )
    vectors = FlatVectors(b, batched)

    def product(v: Tensor) -> Tensor:
        return vectors.pack(matvec(vectors.unpack(v))).add_(v, alpha=damping)

    rhs = vectors.pack(b)
    x = torch.zeros_like(rhs) if x0 is None else vectors.pack(x0)
    residual = rhs.clone() if x0 is None else rhs - product(x)
    target = tol * _norm(rhs)
    checked = _norm(residual)
    active = checked > target
    negative = torch.zeros_like(active)
    direction: Tensor | None = None
    kept: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=directions)
    iterations = 0
    while True:
        if iterations == max_iterations or not bool(active.any()):
            residual = rhs - product(x)
            found = _norm(residual)
            active = (found > target) & (found < 0.5 * checked) & ~negative
            if iterations == max_iterations or not bool(active.any()):
                break
            checked = found
            kept.clear()
        z = residual if preconditioner is None else vectors.pack(preconditioner(vectors.unpack(residual)))
        new = z.clone()
        for d, ad, bend in kept:
            new.addcmul_(d, (inner(ad, z) / bend).unsqueeze(-1), value=-1)
        bent = product(new)
        curvature = inner(new, bent)
        # Below rounding a curvature has no sign; for definite A it is at least 2 / sqrt(condition number) of the product of
        # the norms.
        floor = torch.finfo(rhs.dtype).eps * _norm(new) * _norm(bent)
        good = active & (curvature > floor)
        negative = negative | (active & (curvature <= floor))
        curvature = curvature.where(good, 1.0)
        step = torch.where(good, inner(new, residual) / curvature, 0.0).unsqueeze(-1)
        x.addcmul_(new, step)
        residual.addcmul_(bent, step, value=-1)
        kept.append((new, bent, curvature))
        direction = new
        iterations += 1
        active = good & (_norm(residual) > target)
    last = None if direction is None else vectors.unpack(direction)
    return LinearSolution(vectors.unpack(x), found, iterations, found <= target, negative, last)


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1)
