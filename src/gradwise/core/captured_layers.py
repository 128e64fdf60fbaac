"""The operators whose parameters' per-example gradients follow from their input and the gradient of their output.

Each operator of torch that is listed in `OPERATORS` has a reader: called with the operator's own arguments it says which of
them are parameters, along which dimensions of the input examples may lie, and how input and output gradient become
`ExampleGradients`. Reading operators rather than modules covers what modules hide: functional calls, weights tied between
modules, modules called several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradwise.core.example_gradients import AddedRows, Convolution, ExampleGradients, Formed, OuterProducts


@dataclass(frozen=True)
class ExampleLayout:
    """Where examples lie along one dimension of size N * k: k consecutive entries an example ("major"), or strided by N.

    Example:
        >>> ExampleLayout(axis=0, examples=2, major=True).split(torch.arange(6.0)).tolist()
        [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        >>> ExampleLayout(axis=0, examples=2, major=False).split(torch.arange(6.0)).tolist()
        [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    """

    axis: int
    examples: int
    major: bool = True

    def split(self, t: Tensor) -> Tensor:
        """The tensor as (N, k, the other dimensions in their order)."""
        t = t.movedim(self.axis, 0)
        return t.unflatten(0, (self.examples, -1)) if self.major else t.unflatten(0, (-1, self.examples)).transpose(0, 1)


Gradients = Callable[[ExampleLayout, Tensor, Tensor], ExampleGradients]
"""(layout, input, gradient of the output) -> per-example gradients of one parameter; low precision is widened before the call."""


@dataclass(frozen=True)
class Reading:
    """One call of an operator.

    Attributes:
        input: what the operator works on.
        axes: the dimensions of `input` (and of the output) along which examples may lie.
        parameters: each tensor argument that may be a parameter, with how its per-example gradients are made.

    Example:
        >>> reading = OPERATORS[F.linear](torch.ones(4, 6, 3), torch.ones(2, 3), torch.ones(2))
        >>> list(reading.axes), [tuple(p.shape) for p, _ in reading.parameters]
        ([0, 1], [(2, 3), (2,)])
    """

    input: Tensor
    axes: Sequence[int]
    parameters: list[tuple[Tensor, Gradients]]


def _products(shape: torch.Size, input_is_left: bool = False) -> Gradients:
    """Of a weight (O, I) in y = x W^T, or (I, O) in y = x W, over the last dimensions of x and y."""

    def gradients(layout: ExampleLayout, x: Tensor, dy: Tensor) -> ExampleGradients:
        x, dy = (layout.split(t).flatten(1, -2).unsqueeze(1) for t in (x, dy))
        return OuterProducts(x, dy, shape) if input_is_left else OuterProducts(dy, x, shape)

    return gradients


def _sum_to_last(layout: ExampleLayout, x: Tensor, dy: Tensor) -> ExampleGradients:
    return Formed(layout.split(dy).flatten(1, -2).sum(1))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Reading | None:
    if input.ndim < 2 or weight.ndim != 2:
        return None
    parameters = [(weight, _products(weight.shape))]
    return Reading(input, range(input.ndim - 1), parameters if bias is None else [*parameters, (bias, _sum_to_last)])


def _matmul(input: Tensor, other: Tensor) -> Reading | None:
    if input.ndim < 2 or other.ndim != 2:
        return None
    return Reading(input, range(input.ndim - 1), [(other, _products(other.shape, input_is_left=True))])


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Reading | None:
    if beta != 1 or alpha != 1 or input.ndim != 1:
        return None
    return Reading(mat1, [0], [(mat2, _products(mat2.shape, input_is_left=True)), (input, _sum_to_last)])


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Reading | None:
    if max_norm is not None or scale_grad_by_freq or input.ndim == 0:
        return None
    padding = None if padding_idx is None else padding_idx % len(weight)

    def gradients(layout: ExampleLayout, index: Tensor, dy: Tensor) -> ExampleGradients:
        rows, index = layout.split(dy).flatten(1, -2), layout.split(index).flatten(1)
        if padding is not None:
            rows = rows * (index != padding).unsqueeze(-1)
        return AddedRows(index, rows, weight.shape)

    return Reading(input, range(input.ndim), [(weight, gradients)])


def _affine(
    input: Tensor, axes: Sequence[int], normalised: Callable[[Tensor], Tensor], weight: Any, bias: Any, keep: Sequence[int]
) -> Reading:
    """y = weight * normalised(x) + bias, both constant along every dimension but those of `keep`."""

    def reduce(layout: ExampleLayout, t: Tensor) -> Tensor:
        # split() makes the example dimension the first, its k parts the second, and leaves the others in their order.
        order = [layout.axis] + [d for d in range(input.ndim) if d != layout.axis]
        kept = {order.index(d) + 1 for d in keep}
        t = layout.split(t)
        away = [d for d in range(1, t.ndim) if d not in kept]
        return t.sum(away) if away else t

    found: list[tuple[Tensor, Gradients]] = []
    if weight is not None:
        found.append((weight, lambda layout, x, dy: Formed(reduce(layout, dy * normalised(x).to(dy.dtype)))))
    if bias is not None:
        found.append((bias, lambda layout, x, dy: Formed(reduce(layout, dy))))
    return Reading(input, axes, found)


def _layer_norm(input: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Reading:
    free = input.ndim - len(normalized_shape)
    normalised = lambda x: F.layer_norm(x, normalized_shape, eps=eps)  # noqa: E731
    return _affine(input, range(free), normalised, weight, bias, range(free, input.ndim))


def _rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Reading:
    free = input.ndim - len(normalized_shape)
    normalised = lambda x: F.rms_norm(x, normalized_shape, eps=eps)  # noqa: E731
    return _affine(input, range(free), normalised, weight, None, range(free, input.ndim))


def _group_norm(input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Reading:
    return _affine(input, [0], lambda x: F.group_norm(x, num_groups, eps=eps), weight, bias, [1])


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Reading | None:
    if training or running_mean is None or running_var is None:
        return None
    mean, var = running_mean.detach(), running_var.detach()
    return _affine(input, [0], lambda x: F.batch_norm(x, mean.to(x.dtype), var.to(x.dtype), eps=eps), weight, bias, [1])


def _convolution(dims: int) -> Callable[..., Reading | None]:
    def read(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Reading | None:
        if input.ndim != dims + 2:
            return None
        kernel = weight.shape[2:]
        stride, dilation = _each(stride, dims), _each(dilation, dims)

        def gradients(layout: ExampleLayout, x: Tensor, dy: Tensor) -> ExampleGradients:
            pads = _pads(padding, kernel, dilation)
            return Convolution(layout.split(x), layout.split(dy), weight.shape, stride, dilation, pads, groups)

        def summed(layout: ExampleLayout, x: Tensor, dy: Tensor) -> ExampleGradients:
            return Formed(layout.split(dy.flatten(2).sum(2)).sum(1))

        parameters: list[tuple[Tensor, Gradients]] = [(weight, gradients)]
        return Reading(input, [0], parameters if bias is None else [*parameters, (bias, summed)])

    return read


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) if len(value) == dims else tuple(value) * dims


def _pads(padding: Any, kernel: torch.Size, dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    """(before, after) for each spatial dimension; torch puts the odd one of "same" after."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _each(padding, len(kernel))]


OPERATORS: dict[Any, Callable[..., Reading | None]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
}
"""Reader by operator; a reader returns None for a use it does not cover (the parameter is then left to `torch.func`)."""
