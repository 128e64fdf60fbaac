"""The log-domain kernel: what losses on log-probabilities need, with values and gradients that hold at the edges.

Three things go wrong when a loss is written the way a paper prints it: a difference such as 1 - p^q loses every digit where p
is near 1 or q near 0; an exponential overflows where a logit is far out; and a masked entry that holds inf turns a gradient
into NaN, since 0 * inf is NaN. Each function here uses the form that does none of these. Inputs below float32 (bfloat16,
float16) are computed in float32 and the result stays float32, because a sum of losses in 8 bits of mantissa is not a sum;
float64 stays float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

REDUCTIONS = ("mean", "sum", "none")
"""What `reduce` understands, as in torch's own losses."""


def at_least_float32(x: Tensor) -> Tensor:
    """x itself, or as float32 where its type is shorter than that (bfloat16, float16, float8).

    Raises:
        TypeError: x is not a real floating-point tensor.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype, at_least_float32(torch.ones(1, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, got {x.dtype}")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def log_softmax(logits: Tensor, dim: int = -1) -> Tensor:
    """Logarithms of the class probabilities, x - logsumexp(x) along `dim`; short types are read as they are and summed in float32.

    Raises:
        TypeError: logits are not a real floating-point tensor.

    Example:
        >>> log_softmax(torch.tensor([1e4, -1e4], dtype=torch.bfloat16))
        tensor([     0., -19968.])
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be a floating-point tensor, got {logits.dtype}")
    # The dtype argument lets the kernel widen as it reads, without a float32 copy of the logits.
    return logits.log_softmax(dim, dtype=torch.promote_types(logits.dtype, torch.float32))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, elementwise: the log-probability of what log-probability x leaves over.

    log(-expm1(x)) where e^x > 1/2 and log1p(-e^x) elsewhere, so that no digits cancel (Maechler 2012, "Accurately computing
    log(1 - exp(-|a|))"). The gradient is -1 / expm1(-x). At x = 0 the value is -inf; above 0 it is NaN.

    Example:
        >>> log1mexp(torch.tensor([-1e-20, -50.0]))
        tensor([-4.6052e+01, -1.9287e-22])
    """
    x = at_least_float32(x)
    near = x > -math.log(2)
    # Each branch sees only arguments it is right for: the gradient of the one that is not taken must stay finite too.
    return torch.where(near, (-x.expm1()).log(), (-x.masked_fill(near, -1.0).exp()).log1p())


def log1pexp(x: Tensor) -> Tensor:
    """log(1 + e^x), elementwise: the softplus, exact to the last digit in every type.

    `torch.nn.functional.softplus` returns x itself above a threshold of 20, an error of 2e-9 that float64 shows; this does not.

    Example:
        >>> log1pexp(torch.tensor([-30.0, 0.0, 1e4]))
        tensor([9.3576e-14, 6.9315e-01, 1.0000e+04])
    """
    return -logsigmoid(-at_least_float32(x))


def generalized_nll(log_p: Tensor, power: float) -> Tensor:
    """(1 - p^power) / power of a log-probability log_p <= 0, elementwise, and -log p at power = 0.

    The negative of the Box-Cox transform of p, or of its deformed (Tsallis) logarithm; the comp-sum losses are this with
    power = tau - 1. Its derivative is -p^power. Taken by expm1 it is continuous at power = 0 and keeps its digits at p near
    1; the derivative is taken from exp, since expm1 is -1 to the last digit where p^power is small, and autograd would read a
    slope of 0 off it.

    For power < 0, where power * log_p exceeds 0.7 times the logarithm of the largest number (62 in float32, 497 in float64),
    p^power is about to overflow: from there on the function continues along its tangent, so that value and derivative stay
    finite (and huge).

    Example:
        >>> log_p = torch.tensor([-1e-7, -2.0])
        >>> generalized_nll(log_p, 1.0), generalized_nll(log_p, 0.0)
        (tensor([1.0000e-07, 8.6466e-01]), tensor([1.0000e-07, 2.0000e+00]))
    """
    log_p = at_least_float32(log_p)
    if power == 0:
        return -log_p
    exponent = power * log_p
    tangent: Tensor | float = 0.0
    if power < 0:
        highest = 0.7 * math.log(torch.finfo(log_p.dtype).max)
        tangent = (exponent - highest).relu() * math.exp(highest)
        exponent = exponent.clamp(max=highest)
    grown = exponent.exp()
    # The bracket is 0 and brings the derivative, to every order and in every mode of differentiation.
    return (exponent.expm1().detach() + (grown - grown.detach()) + tangent) / -power


def logcumsumexp(x: Tensor, dim: int = -1, *, keep: Tensor | None = None, reverse: bool = False) -> Tensor:
    """log sum_{j <= i} e^(x_j) along `dim`, finite with finite gradients whatever the entries.

    A scan of ceil(log2 n) steps of logaddexp. `torch.logcumsumexp` differentiates through log(grad) - result + x, which is
    NaN as soon as one entry is -inf and keeps 3 digits at entries of 1e4 in float32; here every partial derivative is a
    product of sigmoids.

    Args:
        x: any shape; entries of -inf count nothing, like masked ones.
        dim: along which to sum.
        keep: boolean, broadcastable to x; entries where it is False count nothing and get no gradient.
        reverse: sum over j >= i instead.

    Returns:
        The shape of x. Where nothing has been summed yet it is half the lowest finite number rather than -inf, so that a
        product with a mask stays 0.

    Example:
        >>> logcumsumexp(torch.tensor([0.0, 0.0, 5.0, 0.0]), keep=torch.tensor([True, True, False, True])).exp()
        tensor([1., 2., 2., 3.])
    """
    x = at_least_float32(x)
    counted = ~x.isneginf() if keep is None else keep & ~x.isneginf()
    total = x.where(counted, torch.finfo(x.dtype).min / 2).movedim(dim, -1)
    total = total.flip(-1) if reverse else total
    shift = 1
    while shift < total.shape[-1]:
        total = torch.cat([total[..., :shift], torch.logaddexp(total[..., shift:], total[..., :-shift])], -1)
        shift *= 2
    return (total.flip(-1) if reverse else total).movedim(-1, dim)


def pairwise_softplus(higher: Tensor, lower: Tensor, keep: Tensor | None = None) -> Tensor:
    """log(1 + e^(lower_j - higher_i)) for every pair (i, j): the logistic cost of each pair that should be ordered i above j.

    Args:
        higher: (..., m) scores that should be the higher ones.
        lower: (..., n) scores that should be the lower ones.
        keep: boolean, broadcastable to (..., m, n); a pair where it is False costs 0 and gets no gradient, even if a score is
            inf or NaN.

    Returns:
        (..., m, n).

    Raises:
        ValueError: the leading dimensions of `higher` and `lower` do not broadcast.

    Example:
        >>> pairwise_softplus(torch.tensor([2.0, 0.0]), torch.tensor([0.0]))
        tensor([[0.1269],
                [0.6931]])
    """
    try:
        torch.broadcast_shapes(higher.shape[:-1], lower.shape[:-1])
    except RuntimeError:
        shapes = f"higher {tuple(higher.shape)} and lower {tuple(lower.shape)}"
        raise ValueError(f"leading dimensions must broadcast, got {shapes}") from None
    gap = at_least_float32(lower).unsqueeze(-2) - at_least_float32(higher).unsqueeze(-1)
    if keep is None:
        return log1pexp(gap)
    return log1pexp(gap.masked_fill(~keep, 0.0)).masked_fill(~keep, 0.0)


def reduce(values: Tensor, keep: Tensor | None = None, reduction: str = "mean", *, weight: Tensor | None = None) -> Tensor:
    """Mean, sum, or each of the values that count.

    Args:
        values: the losses, any shape.
        keep: boolean, the shape of `values`; where it is False a value counts nothing ("none" shows 0 there), even if it is
            inf or NaN.
        reduction: "mean" divides by the number of values kept (NaN when there are none, as in torch); "sum"; or "none".
        weight: the shape of `values`; weights that the values already carry, by whose sum over the kept ones "mean" divides
            instead.

    Raises:
        ValueError: an unknown reduction, or shapes of `values` and `keep` or `weight` that differ (both are named).

    Example:
        >>> values, keep = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])
        >>> float(reduce(values, keep, "mean")), float(reduce(values, keep, "sum")), reduce(values, keep, "none").tolist()
        (2.0, 4.0, [1.0, 3.0, 0.0])
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    for name, given in (("keep", keep), ("weight", weight)):
        if given is not None and given.shape != values.shape:
            raise ValueError(f"{name} must have the shape of values {tuple(values.shape)}, got {tuple(given.shape)}")
    if keep is not None:
        values = values.masked_fill(~keep, 0.0)
        weight = keep.to(values.dtype) if weight is None else weight.masked_fill(~keep, 0.0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    return values.mean() if weight is None else values.sum() / weight.sum()
