"""Comp-sum losses: one number, tau, runs from the sum-exponential loss through cross-entropy to the mean absolute error.

With p the softmax probability of the label and u = sum_{y' != y} e^(h_y' - h_y) = 1/p - 1, the family is

    l_tau = Phi_tau(u) = ((1 + u)^(1 - tau) - 1) / (1 - tau) = (1 - p^(tau - 1)) / (tau - 1),      l_1 = log(1 + u) = -log p.

Its gradient in the scores is p^(tau - 1) (softmax - onehot): cross-entropy's, weighted by p^(tau - 1). A larger tau listens
less to examples the model finds unlikely, which helps when labels are wrong and slows learning when they are right. tau = 0
is the sum-exponential loss, 1 cross-entropy, 1 < tau < 2 generalized cross-entropy with q = tau - 1, and 2 the mean absolute
error 1 - p. Every member comes with a bound on the excess zero-one error that an excess loss still allows
(`h_consistency_bound`). The adversarial half of the paper is in `comp_sum_adversarial.py`.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from gradwise.core.logdomain import REDUCTIONS, generalized_nll, log_softmax, reduce
from gradwise.core.papers import paper
from gradwise.core.search_space import Choice, SearchSpace


@paper("comp_sum", title="Cross-Entropy Loss Functions: Theoretical Analysis and Applications", arxiv="2304.07288")
class CompSumLoss(nn.Module):
    """The comp-sum loss l_tau = (1 - p^(tau - 1)) / (tau - 1) of the label's probability p; at tau = 1, -log p.

    A drop-in for `torch.nn.CrossEntropyLoss`: the same arguments with the same meaning, and at tau = 1 the same values. The
    math, the shapes and the numerics are those of `comp_sum_loss`.

    Args:
        tau: member of the family, >= 0.
        weight: (C,) weight of each class; a buffer, so that it moves with the module.
        ignore_index: target value that contributes nothing.
        label_smoothing: share in [0, 1] of the target spread evenly over the classes.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: tau < 0, label_smoothing outside [0, 1], an unknown reduction; and what `comp_sum_loss` raises.

    Example:
        >>> import torch
        >>> logits, target = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
        >>> float(CompSumLoss(tau=2.0)(logits, target)) == float(1 - logits.softmax(1)[:, 0].mean())
        True

    Source: Mao, Mohri and Zhong 2023, the family Phi_tau.
    """

    search_space: ClassVar[SearchSpace] = {"tau": Choice((0.0, 0.5, 1.0, 1.5, 2.0))}
    weight: Tensor | None

    def __init__(
        self,
        tau: float = 1.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check(tau, label_smoothing, reduction)
        self.register_buffer("weight", weight)
        self.tau, self.ignore_index, self.label_smoothing, self.reduction = tau, ignore_index, label_smoothing, reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return comp_sum_loss(
            logits,
            target,
            self.tau,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        names = ("tau", "ignore_index", "label_smoothing", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


@paper("comp_sum")
def comp_sum_loss(
    logits: Tensor,
    target: Tensor,
    tau: float = 1.0,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The comp-sum loss l_tau = (1 - p^(tau - 1)) / (tau - 1), p = softmax(logits)[target]; at tau = 1, -log p.

    Everything around l_tau is as in `torch.nn.functional.cross_entropy`, to which this is equal at tau = 1: the loss of an
    example is w_y ((1 - e) l_tau(y)) + e/C sum_c w_c l_tau(c) with e = label_smoothing, and "mean" divides by the sum of w_y
    over the examples kept. Target may also hold class probabilities q (floating point, the shape of logits); then the loss is
    sum_c q_c w_c l_tau(c), and "mean" divides by the number of examples.

    It is computed as -expm1((tau - 1) log p) / (tau - 1), continuous in tau at 1 and exact near p = 1. For tau < 1 the loss
    grows like p^(tau - 1) = e^((1 - tau) (-log p)) and is huge on a confident mistake: clip the gradient, or raise tau. Where
    that would overflow (e^62 in float32) it continues along its tangent, so that loss and gradient stay finite for any
    logits within +-1e8. Logits in bfloat16 or float16 are computed in float32 and the loss is float32.

    Args:
        logits: scores; unbounded, not normalised.
        target: class indices, or class probabilities.
        tau: member of the family, >= 0.
        weight: (C,) weight of each class.
        ignore_index: target index that contributes nothing to the loss nor to what "mean" divides by.
        label_smoothing: share in [0, 1] of the target spread evenly over the classes.
        reduction: "mean" (NaN when nothing is left to average, as in torch), "sum" or "none".

    Shapes:
        logits (C,), (N, C) or (N, C, d1, ...) with target (), (N,) or (N, d1, ...), or with the shape of logits for
        probabilities. The result is a scalar, or for "none" has the shape of the target without its class dimension.

    Raises:
        ValueError: tau < 0, label_smoothing outside [0, 1], an unknown reduction, shapes of logits and target or weight that
            disagree (both are named), or ignore_index >= 0 together with class probabilities.
        IndexError: a target outside 0..C-1 that is not ignore_index.

    Example:
        >>> import torch
        >>> logits, target = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
        >>> comp_sum_loss(logits, target, tau=0.0, reduction="none")
        tensor([ 0.1353, 20.0855])
        >>> torch.allclose(comp_sum_loss(logits, target), nn.functional.cross_entropy(logits, target))
        True

    Source: Mao, Mohri and Zhong 2023, the family Phi_tau.
    """
    _check(tau, label_smoothing, reduction)
    _check_shapes(logits, target, weight)
    class_dim = min(1, logits.ndim - 1)
    classes = logits.shape[class_dim]
    log_p = log_softmax(logits, class_dim)
    by_class = None if weight is None else weight.to(log_p.dtype).reshape([-1] + [1] * (logits.ndim - 1 - class_dim))

    if target.is_floating_point():
        if ignore_index >= 0:
            raise ValueError(f"ignore_index={ignore_index} needs a target of class indices, got one of {target.dtype}")
        share = target.to(log_p.dtype) * (1 - label_smoothing) + label_smoothing / classes
        losses = generalized_nll(log_p, tau - 1)
        losses = losses if by_class is None else losses * by_class
        return reduce((share * losses).sum(class_dim), None, reduction)

    keep, target = target != ignore_index, target.long()
    # nll_loss gathers -log p of the label, 0 where it is ignored; the power then only touches one number an example.
    values = generalized_nll(-nn.functional.nll_loss(log_p, target, ignore_index=ignore_index, reduction="none"), tau - 1)
    by_example = None if weight is None else weight.to(log_p.dtype)[target.where(keep, 0)]
    if by_example is not None:
        values = values * by_example
    if label_smoothing > 0:
        losses = generalized_nll(log_p, tau - 1)
        losses = losses if by_class is None else losses * by_class
        values = (1 - label_smoothing) * values + label_smoothing / classes * losses.sum(class_dim)
    return reduce(values, keep, reduction, weight=by_example)


@paper("comp_sum")
def h_consistency_bound(excess: float, tau: float, n_classes: int, closed: bool = False) -> float:
    """The excess zero-one error that an excess comp-sum loss still allows: Gamma_tau(excess), for complete symmetric
    hypothesis sets.

    E01(h) - E01* + M01 <= Gamma_tau(E_tau(h) - E_tau* + M_tau), Gamma_tau = T_tau^-1 on [0, 1], where with n classes and
    A(b) = (((1 + b)^(1/(2 - tau)) + (1 - b)^(1/(2 - tau))) / 2)^(2 - tau)

        T_tau(b) = 2^(1 - tau) / (1 - tau) (1 - A(b))                         0 <= tau < 1
                 = (1 + b)/2 log(1 + b) + (1 - b)/2 log(1 - b)                tau = 1
                 = (A(b) - 1) / ((tau - 1) n^(tau - 1))                       1 < tau < 2
                 = b / ((tau - 1) n^(tau - 1))                                tau >= 2.

    The minimizability gaps M are zero when all measurable functions are allowed. Otherwise they depend on the unknown
    distribution and cannot be
    computed from data: `excess` is the whole argument of Gamma, and adding the gap to it is the caller's business.

    Args:
        excess: E_tau(h) - E_tau* + M_tau, in units of the loss, >= 0.
        tau: member of the family, >= 0.
        n_classes: number of labels, >= 2.
        closed: return the paper's closed upper bound of Gamma_tau instead: sqrt(2^tau (2 - tau) t) below 1, sqrt(2 n^(tau -
            1) t) below 2, and (tau - 1) n^(tau - 1) t from there on.

    Returns:
        A difference of error rates in [0, 1]; 1 says nothing.

    Raises:
        ValueError: excess < 0, tau < 0 or n_classes < 2.

    Example:
        >>> round(h_consistency_bound(0.02, tau=1.0, n_classes=10), 4), round(h_consistency_bound(0.02, 1.0, 10, closed=True), 4)
        (0.1993, 0.2)

    Source: Mao, Mohri and Zhong 2023, H-consistency bounds of comp-sum losses.
    """
    if not excess >= 0:
        raise ValueError(f"excess must be at least 0, got {excess}")
    if n_classes < 2:
        raise ValueError(f"n_classes must be at least 2, got {n_classes}")
    _check(tau)
    if tau >= 2:
        return min(1.0, (tau - 1) * n_classes ** (tau - 1) * excess)
    if closed:
        return min(1.0, math.sqrt(2**tau * (2 - tau) * excess if tau < 1 else 2 * n_classes ** (tau - 1) * excess))
    if excess == 0 or excess >= _transform(1.0, tau, n_classes):
        return 1.0 if excess else 0.0
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:  # until no number lies between them
        low, high = (middle, high) if _transform(middle, tau, n_classes) <= excess else (low, middle)
    return low


def _transform(b: float, tau: float, n_classes: int) -> float:
    """T_tau(b) for tau < 2: how much comp-sum loss an excess error of b costs at least."""
    if tau == 1:
        if b < 1e-2:  # the two logarithms cancel to second order
            return b**2 / 2 + b**4 / 12 + b**6 / 30 + b**8 / 56
        return ((1 + b) * math.log1p(b) + ((1 - b) * math.log1p(-b) if b < 1 else 0.0)) / 2
    growth = math.expm1((2 - tau) * _log_power_mean(b, 1 / (2 - tau)))  # A(b) - 1
    return -(2 ** (1 - tau)) / (1 - tau) * growth if tau < 1 else growth / ((tau - 1) * n_classes ** (tau - 1))


def _log_power_mean(b: float, k: float) -> float:
    """log(((1 + b)^k + (1 - b)^k) / 2), without cancellation at small b or at k near 1, and without overflow at large k."""
    if max(k, 1.0) * b < 0.9:
        term, total, j = 1.0, 0.0, 0
        # sum_j C(k, 2j) b^(2j): every term has the factor k - 1, which a difference of powers would lose.
        while abs(term) > 1e-17 * abs(total):
            term *= (k - j) * (k - j - 1) / ((j + 1) * (j + 2)) * b * b
            total, j = total + term, j + 2
        return math.log1p(total)
    ratio = ((1 - b) / (1 + b)) ** k
    return k * math.log1p(b) + math.log1p(ratio) - math.log(2)


def _check(tau: float, label_smoothing: float = 0.0, reduction: str = "mean") -> None:
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau must be a number >= 0, got {tau}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def _check_shapes(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if logits.ndim == 0:
        raise ValueError(f"logits need a class dimension, got logits of shape () and target of shape {tuple(target.shape)}")
    expected = tuple(logits.shape[:1] + logits.shape[2:]) if logits.ndim > 1 else ()
    shape = tuple(target.shape)
    if target.is_floating_point():
        if shape != tuple(logits.shape):
            raise ValueError(f"a target of class probabilities needs the shape of logits {tuple(logits.shape)}, got {shape}")
    elif shape != expected:
        raise ValueError(f"logits of shape {tuple(logits.shape)} need a target of shape {expected}, got {shape}")
    classes = logits.shape[min(1, logits.ndim - 1)]
    if weight is not None and tuple(weight.shape) != (classes,):
        raise ValueError(f"logits of shape {tuple(logits.shape)} need a weight of shape {(classes,)}, got {tuple(weight.shape)}")
