"""Lanczos and stochastic Lanczos quadrature: what the spectrum of a symmetric matrix looks like, from products with it.

After m steps from a unit vector q the matrix A is seen through a small tridiagonal T (m, m). Its eigenvalues (Ritz values) find the
extremes of A's spectrum first, and with the squared first components of its eigenvectors as weights they form the Gauss
quadrature of the spectral measure of q: sum_j weight_j f(value_j) = <q, f(A) q>, exact for polynomials of degree 2 m - 1.
Averaged over random q this gives tr f(A) and the density of eigenvalues.

A is any `core.curvature.Matvec`. Inside, a vector is one flat tensor in at least float32, so that orthogonalisation is two
matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwise.core.curvature import Matvec
from gradwise.core.flat_vectors import Distribution, FlatVectors, inner, random_vector
from gradwise.core.hutchinson import TraceEstimate, estimate
from gradwise.core.protocols import NamedTensors


@dataclass(frozen=True)
class Tridiagonal:
    """What Lanczos leaves: A seen from one start vector (with `batched=True`, from one a row of a leading dimension).

    Attributes:
        diagonal: alpha (..., m).
        off_diagonal: beta (..., m - 1), positive; zeros follow where a start vector's space was exhausted (its rows of T are
            then zero).
        remainder: the beta that would come next (...); |remainder * last component of a T-eigenvector| bounds that Ritz
            value's error.
        exhausted: whether the space was exhausted (...): T's eigenvalues are then eigenvalues of A, and the quadrature is exact.
        basis: the orthonormal q_j by parameter name, (m, *shape) each ((B, m, *shape) when batched), if it was asked for.

    Example:
        >>> result = lanczos(lambda v: {"x": torch.tensor([1.0, 2.0, 4.0]) * v["x"]}, {"x": torch.ones(3)}, 3)
        >>> [round(value, 4) for value in result.ritz_values().tolist()]
        [1.0, 2.0, 4.0]
    """

    diagonal: Tensor
    off_diagonal: Tensor
    remainder: Tensor
    exhausted: Tensor
    basis: NamedTensors | None

    def matrix(self) -> Tensor:
        """T (..., m, m), in float64.

        Example:
            >>> Tridiagonal(torch.ones(2), torch.ones(1), torch.zeros(()), torch.tensor(True), None).matrix().tolist()
            [[1.0, 1.0], [1.0, 1.0]]
        """
        beta = self.off_diagonal.double()
        return torch.diag_embed(self.diagonal.double()) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)

    def ritz_values(self) -> Tensor:
        """Eigenvalues of T (..., m) in ascending order, float64.

        Example:
            >>> Tridiagonal(torch.ones(2), torch.ones(1), torch.zeros(()), torch.tensor(True), None).ritz_values().round().tolist()
            [0.0, 2.0]
        """
        return torch.linalg.eigvalsh(self.matrix())

    def ritz_vectors(self) -> NamedTensors:
        """The approximate eigenvectors of A by name, (..., m, *shape), unit and in the order of `ritz_values`.

        Raises:
            ValueError: the basis was not kept.

        Example:
            >>> result = lanczos(lambda v: {"x": torch.tensor([1.0, 2.0]) * v["x"]}, {"x": torch.ones(2)}, 2, keep_basis=True)
            >>> result.ritz_vectors()["x"].abs().round().tolist()
            [[1.0, 0.0], [0.0, 1.0]]
        """
        if self.basis is None:
            raise ValueError("ritz_vectors needs the basis: call lanczos(..., keep_basis=True)")
        vectors = torch.linalg.eigh(self.matrix())[1].mT
        batch = self.diagonal.ndim
        flat = {name: q.reshape(*q.shape[:batch], -1) for name, q in self.basis.items()}
        return {name: (vectors.to(q.dtype) @ q).view(self.basis[name].shape) for name, q in flat.items()}

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights (..., m), float64: <q, f(A) q> is about sum_j weight_j f(node_j); weights sum to 1 (q a unit vector).

        Example:
            >>> result = lanczos(lambda v: {"x": torch.tensor([1.0, 3.0]) * v["x"]}, {"x": torch.ones(2)}, 2)
            >>> nodes, weights = result.quadrature()
            >>> round(float((weights * nodes**2).sum()), 5)  # <q, A^2 q> = (1 + 9) / 2
            5.0
        """
        values, vectors = torch.linalg.eigh(self.matrix())
        return values, vectors[..., 0, :].square()


def lanczos(
    matvec: Matvec,
    start: NamedTensors,
    steps: int,
    *,
    reorthogonalize: bool = True,
    keep_basis: bool = False,
    batched: bool = False,
) -> Tridiagonal:
    """Tridiagonalise a symmetric (or Hermitian) matrix from a start vector.

        w = A q_j - beta_{j-1} q_{j-1};  alpha_j = <w, q_j>;  w <- w - alpha_j q_j;  beta_j = ||w||;  q_{j+1} = w / beta_j

    Without re-orthogonalisation rounding lets converged directions back in and T repeats the extreme eigenvalues ("ghosts"),
    though its quadrature stays good; it needs three vectors whatever `steps`. With it, w is orthogonalised twice against all
    earlier q, which keeps `steps` vectors. When beta_j vanishes against ||T|| (an invariant subspace, the "happy breakdown")
    the iteration ends early.

    Args:
        matvec: A; with `batched`, of vectors whose first dimension counts the start vectors, such as `torch.vmap(matvec)`.
        start: where to begin, not zero; its length does not matter.
        steps: m >= 1; never more than the number of entries.
        reorthogonalize: see above.
        keep_basis: return the q_j (kept internally anyway with `reorthogonalize`).
        batched: several start vectors at once, along the first dimension of every tensor of `start`.

    Raises:
        ValueError: steps < 1, a start vector without entries, zero or not finite, or a product that is not finite.

    Example:
        >>> diagonal = torch.arange(100.0)
        >>> result = lanczos(lambda v: {"x": diagonal * v["x"]}, {"x": torch.ones(100)}, 30)
        >>> round(float(result.ritz_values()[-1]), 1)
        99.0

    Source: Lanczos 1950; Golub and Van Loan, "Matrix Computations", section 10.1; Paige 1976 on what rounding does.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    vectors = FlatVectors(start, batched)
    q = vectors.pack(start)
    steps = min(steps, vectors.size)
    length = torch.linalg.vector_norm(q, dim=-1)
    if not steps or not bool((length.isfinite() & (length > 0)).all()):
        raise ValueError(f"start must be a finite vector other than zero, got {vectors.size} entries of norm {length.tolist()}")
    q.div_(length.unsqueeze(-1))
    kept = q.new_empty(*length.shape, steps, vectors.size) if reorthogonalize or keep_basis else None
    # The level at which a remainder is rounding: eps^(2/3) is 2e-5 in float32 and 4e-11 in float64.
    floor = torch.finfo(q.dtype).eps ** (2 / 3)
    previous = torch.zeros_like(q[..., :1])
    beta = scale = torch.zeros_like(length)
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for step in range(steps):
        if kept is not None:
            kept[..., step, :] = q
        w = vectors.pack(matvec(vectors.unpack(q)))
        w.addcmul_(previous, beta.unsqueeze(-1), value=-1)
        alpha = inner(q, w)
        w.addcmul_(q, alpha.unsqueeze(-1), value=-1)
        if kept is not None and reorthogonalize:
            so_far = kept[..., : step + 1, :]
            for _ in range(2):  # once is not enough: what cancels leaves rounding of the first pass behind
                w -= (so_far.mT @ (so_far.conj() @ w.unsqueeze(-1))).squeeze(-1)
        beta = torch.linalg.vector_norm(w, dim=-1)
        scale = torch.maximum(scale, torch.maximum(alpha.abs(), beta))
        alive = beta > floor * scale
        beta = beta.where(alive, 0.0)
        alphas.append(alpha)
        betas.append(beta)
        if not bool(alive.any()):
            break
        previous, q = q, w.mul_(torch.where(alive, 1 / beta, 0.0).unsqueeze(-1))
    diagonal, off_diagonal = torch.stack(alphas, -1), torch.stack(betas, -1)
    if not bool(diagonal.isfinite().all() & off_diagonal.isfinite().all()):
        raise ValueError("matvec returned values that are not finite")
    exhausted = (off_diagonal == 0).any(-1) | (diagonal.shape[-1] == vectors.size)
    basis = vectors.unpack(kept[..., : diagonal.shape[-1], :]) if keep_basis and kept is not None else None
    return Tridiagonal(diagonal, off_diagonal[..., :-1], off_diagonal[..., -1], exhausted, basis)


@dataclass(frozen=True)
class SpectralQuadrature:
    """The density of a matrix's eigenvalues as point masses, one row a random probe.

    Attributes:
        nodes: (probes, m), float64; rows that ended early are padded with nodes of weight 0.
        weights: (probes, m), each row sums to 1.
        size: P, the side of the matrix.

    Example:
        >>> quadrature = SpectralQuadrature(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.5]]), size=10)
        >>> quadrature.trace(lambda t: t).value.item()
        15.0
    """

    nodes: Tensor
    weights: Tensor
    size: int

    def trace(self, f: Callable[[Tensor], Tensor]) -> TraceEstimate:
        """tr f(A) = P * mean over probes of sum_j weight_j f(node_j), with its standard error over probes.

        Args:
            f: elementwise on the nodes; where a weight is 0 its value does not matter.

        Example:
            >>> matvec = lambda v: {"x": torch.tensor([1.0, 2.0, 3.0]) * v["x"]}
            >>> quadrature = stochastic_lanczos_quadrature(matvec, {"x": torch.zeros(3)}, steps=3, probes=1)
            >>> round(quadrature.trace(torch.log).value.exp().item(), 4)  # the determinant
            6.0
        """
        terms = torch.where(self.weights > 0, self.weights * f(self.nodes), 0.0)
        return estimate(self.size * terms.sum(-1))


def stochastic_lanczos_quadrature(
    matvec: Matvec,
    like: NamedTensors,
    steps: int,
    probes: int = 1,
    *,
    generator: torch.Generator | None = None,
    distribution: Distribution = "rademacher",
    reorthogonalize: bool = True,
    batched: bool = False,
) -> SpectralQuadrature:
    """The spectral density of a symmetric matrix: Lanczos from random probes, each read as a Gauss quadrature.

    Probes run one after the other, so memory does not grow with them: about `steps` vectors with re-orthogonalisation, three
    without.

    Args:
        matvec: A (with `batched`, of all probes at once, such as `torch.vmap(matvec)`: faster where launching kernels is what
            takes the time).
        like: names, shapes, dtypes and device of the vectors, such as the parameters.
        steps, reorthogonalize: as in `lanczos`.
        probes: how many random vectors, at least 1.
        generator: of the probes.
        distribution: "rademacher" (signs; the lower variance) or "normal".
        batched: all probes in one Lanczos run.

    Raises:
        ValueError: probes < 1, an unknown distribution, or as in `lanczos`.

    Example:
        >>> matvec = lambda v: {"x": 2.0 * v["x"]}
        >>> quadrature = stochastic_lanczos_quadrature(matvec, {"x": torch.zeros(4)}, steps=3, probes=2)
        >>> quadrature.nodes.tolist(), quadrature.weights.tolist()  # all mass at the one eigenvalue, found in one step
        ([[2.0], [2.0]], [[1.0], [1.0]])

    Source: Ubaru, Chen, Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature".
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    if batched:
        drawn = [random_vector(like, distribution, generator) for _ in range(probes)]
        start = {name: torch.stack([probe[name] for probe in drawn]) for name in like}
        rows = [lanczos(matvec, start, steps, reorthogonalize=reorthogonalize, batched=True).quadrature()]
    else:
        rows = []
        for _ in range(probes):
            run = lanczos(matvec, random_vector(like, distribution, generator), steps, reorthogonalize=reorthogonalize)
            nodes, weights = run.quadrature()
            rows.append((nodes.unsqueeze(0), weights.unsqueeze(0)))
    longest = max(nodes.shape[-1] for nodes, _ in rows)
    pad = [(0, longest - nodes.shape[-1]) for nodes, _ in rows]
    return SpectralQuadrature(
        torch.cat([torch.nn.functional.pad(nodes, p) for (nodes, _), p in zip(rows, pad, strict=True)]),
        torch.cat([torch.nn.functional.pad(weights, p) for (_, weights), p in zip(rows, pad, strict=True)]),
        sum(t.numel() for t in like.values()),
    )
