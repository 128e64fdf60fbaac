"""What one use of a parameter adds to each example's gradient, kept as the small factors it is made of.

A layer that multiplies (Linear, convolution) adds sum_t left_t right_t^T to an example's gradient, t running over positions:
its squared norm follows from two Gram matrices of positions, ||sum_t left_t right_t^T||^2 = sum_{t,u} <left_t, left_u>
<right_t, right_u>, without the gradient. A lookup adds rows at indices, an affine normalisation or a bias a vector. Each kind
can give its squared norms, its gradients for a few examples (which is all that sums over several uses need) and the number of
entries that this takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight


def scratch_entries(device: torch.device) -> int:
    """Entries that temporary gradients, patches or Gram matrices may take at once; one example's always may.

    8 MB in float32 on a CPU, about its cache; 128 MB elsewhere, where few large launches are what is fast.

    Example:
        >>> scratch_entries(torch.device("cpu"))
        2097152
    """
    return 1 << (21 if device.type == "cpu" else 25)



class ExampleGradients(Protocol):
    """The gradients of N examples with respect to one parameter, in some factored form.

    Attributes:
        examples: N.
        entries: that one example's gradient takes, with what it is made of.
        device: where it is.

    Example:
        >>> terms: ExampleGradients = Formed(torch.ones(4, 3))
        >>> terms.squared_norms()
        tensor([3., 3., 3., 3.])
    """

    @property
    def examples(self) -> int: ...

    @property
    def entries(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def gradients(self, rows: slice) -> Tensor:
        """The gradients of some examples, (n, *shape of the parameter)."""

    def squared_norms(self) -> Tensor:
        """||g_i||^2, (N,)."""


@dataclass(frozen=True)
class Formed:
    """Gradients as they are, for parameters so small that N of them are no burden (biases, affine weights).

    Attributes:
        values: (N, *shape).

    Example:
        >>> Formed(torch.ones(4, 3)).gradients(slice(0, 2)).shape
        torch.Size([2, 3])
    """

    values: Tensor

    @property
    def examples(self) -> int:
        return len(self.values)

    @property
    def entries(self) -> int:
        return self.values[0].numel()

    @property
    def device(self) -> torch.device:
        return self.values.device

    def gradients(self, rows: slice) -> Tensor:
        """See `ExampleGradients`."""
        return self.values[rows]

    def squared_norms(self) -> Tensor:
        """See `ExampleGradients`."""
        return self.values.flatten(1).square().sum(1)


@dataclass(frozen=True)
class OuterProducts:
    """g_i = sum_t left_it right_it^T, group by group: the weight of a Linear layer or a convolution.

    For `y = W x` left is dloss/dy and right is x; a convolution's right are its input patches, its positions the output's pixels.

    Attributes:
        left: (N, G, T, O): examples, groups, positions, rows.
        right: (N, G, T, I).
        shape: of the parameter, G * O * I entries.

    Example:
        >>> terms = OuterProducts(torch.ones(4, 1, 5, 3), torch.ones(4, 1, 5, 2), torch.Size([3, 2]))
        >>> terms.gradients(slice(0, 1)).tolist()
        [[[5.0, 5.0], [5.0, 5.0], [5.0, 5.0]]]
        >>> terms.squared_norms()
        tensor([150., 150., 150., 150.])
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    @property
    def examples(self) -> int:
        return len(self.left)

    @property
    def entries(self) -> int:
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        return self.left.device

    def gradients(self, rows: slice) -> Tensor:
        """See `ExampleGradients`."""
        return (self.left[rows].mT @ self.right[rows]).reshape(-1, *self.shape)

    def squared_norms(self) -> Tensor:
        """See `ExampleGradients`; takes the cheaper of Gram matrices and gradients formed for a few examples at a time."""
        positions, o, i = self.left.shape[2], self.left.shape[3], self.right.shape[3]
        if positions == 1:
            return (self.left.square().sum((2, 3)) * self.right.square().sum((2, 3))).sum(1)
        form = positions * (o + i) >= o * i
        size = max(1, scratch_entries(self.device) // (self.entries if form else 2 * self.left.shape[1] * positions**2))
        pairs = zip(self.left.split(size), self.right.split(size), strict=True)
        if form:
            return torch.cat([(b.mT @ a).square().sum((1, 2, 3)) for a, b in pairs])
        return torch.cat([((a @ a.mT) * (b @ b.mT)).sum((1, 2, 3)) for a, b in pairs])


@dataclass(frozen=True)
class Convolution:
    """The weight of a convolution: outer products of output gradients and input patches, a few examples at a time.

    Patches repeat every input entry as often as the kernel covers it, so that all of them together would outweigh the activations.

    Attributes:
        input: (N, k, C, *space): k images an example.
        slope: (N, k, O, *space): the gradient of the output.
        shape: of the weight, (O, C / groups, *kernel).
        stride, dilation: one number a dimension.
        pads: (before, after) for each dimension.
        groups: of channels.

    Example:
        >>> terms = Convolution(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 3), torch.Size([1, 1, 2]), (1,), (1,), [(0, 0)], 1)
        >>> terms.squared_norms()
        tensor([18., 18.])
    """

    input: Tensor
    slope: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: Sequence[tuple[int, int]]
    groups: int

    @property
    def examples(self) -> int:
        return len(self.input)

    @property
    def entries(self) -> int:
        return max(self.shape.numel(), self._positions * self.groups * self.shape[1:].numel())

    @property
    def device(self) -> torch.device:
        return self.input.device

    @property
    def _positions(self) -> int:
        return self.slope.shape[1] * self.slope.shape[3:].numel()

    def factors(self, rows: slice, *, ordered: bool = True) -> OuterProducts:
        """The outer products of some examples, their positions being the output's pixels.

        Args:
            rows: which examples.
            ordered: patches list their entries as the weight does; without, in the order that is quickest to copy (norms do not
                mind).

        Example:
            >>> terms = Convolution(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 3), torch.Size([1, 1, 2]), (1,), (1,), [(0, 0)], 1)
            >>> terms.factors(slice(0, 2)).right.shape
            torch.Size([2, 1, 3, 2])
        """
        slope = self.slope[rows].flatten(0, 1).flatten(2)
        input = _padded(self.input[rows].flatten(0, 1), self.pads)
        # Copies are quick where runs of memory are long: kernel rows of all channels, or rows of the output.
        channels_run = input.shape[1] * (self.shape[-1] if self.dilation[-1] == 1 else 1)
        pixels_run = self.slope.shape[-1] if self.stride[-1] == 1 else 1
        if not ordered and self.groups == 1 and channels_run > pixels_run:
            patches = _patches(input.movedim(1, -1).contiguous(), 1, self)
            patches = patches.movedim(1 + len(self.stride), -1).flatten(1, len(self.stride)).flatten(2).unsqueeze(1)
        else:
            patches = _patches(input, 2, self)
            dims = range(2, 2 + len(self.stride))
            patches = patches.permute(0, 1, *(d + len(dims) for d in dims), *dims).flatten(1, 1 + len(dims)).flatten(2)
            patches = patches.unflatten(1, (self.groups, -1)).mT
        left = slope.unflatten(1, (self.groups, -1)).mT
        return OuterProducts(self._by_example(left), self._by_example(patches), self.shape)

    def gradients(self, rows: slice) -> Tensor:
        """See `ExampleGradients`."""
        return self.factors(rows).gradients(slice(None))

    def squared_norms(self) -> Tensor:
        """See `ExampleGradients`."""
        height, width = self.shape[0] // self.groups, self.shape[1:].numel()
        formed = self._positions * (height + width) >= height * width
        # Where one example keeps a core busy, the convolution's own kernel is quicker than writing patches out.
        if formed and self.device.type == "cpu" and self._positions * self.shape.numel() >= 1 << 22:
            return torch.stack([self._one(i).square().sum() for i in range(self.examples)])
        size = max(1, scratch_entries(self.device) // self.entries)
        chunks = (slice(first, first + size) for first in range(0, self.examples, size))
        return torch.cat([self.factors(rows, ordered=False).squared_norms() for rows in chunks])

    def _by_example(self, t: Tensor) -> Tensor:
        """(n k, G, T, D) to (n, G, k T, D)."""
        images = self.input.shape[1]
        return t if images == 1 else t.unflatten(0, (-1, images)).transpose(1, 2).flatten(2, 3)

    def _one(self, row: int) -> Tensor:
        weight_gradient = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}[len(self.stride)]
        padded = _padded(self.input[row], self.pads)
        return weight_gradient(padded, list(self.shape), self.slope[row], list(self.stride), 0, list(self.dilation), self.groups)


@dataclass(frozen=True)
class AddedRows:
    """g_i has row[it] added at index[it] for every t: the table of an embedding.

    Attributes:
        index: (N, T), integers.
        rows: (N, T, I); zero where nothing is to be added (padding).
        shape: of the table, (V, I).

    Example:
        >>> terms = AddedRows(torch.tensor([[0, 1], [1, 1]]), torch.ones(2, 2, 3), torch.Size([10, 3]))
        >>> terms.squared_norms()
        tensor([ 6., 12.])
    """

    index: Tensor
    rows: Tensor
    shape: torch.Size

    @property
    def examples(self) -> int:
        return len(self.index)

    @property
    def entries(self) -> int:
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        return self.index.device

    def gradients(self, rows: slice) -> Tensor:
        """See `ExampleGradients`."""
        index, added = self.index[rows], self.rows[rows]
        table = added.new_zeros(len(index), *self.shape)
        return table.scatter_add_(1, index.unsqueeze(-1).expand_as(added), added)

    def squared_norms(self) -> Tensor:
        """See `ExampleGradients`: sum over pairs of positions that look up the same row, of their inner products."""
        size = max(1, scratch_entries(self.device) // (2 * max(self.index.shape[1], 1) ** 2))
        pairs = zip(self.index.split(size), self.rows.split(size), strict=True)
        return torch.cat([(rows @ rows.mT).where(i.unsqueeze(1) == i.unsqueeze(2), 0.0).sum((1, 2)) for i, rows in pairs])


def summed_squared_norms(terms: Sequence[ExampleGradients]) -> Tensor:
    """||sum_k g_ik||^2 (N,) for a parameter that is used several times, its gradients formed for a few examples at a time.

    Example:
        >>> summed_squared_norms([Formed(torch.ones(2, 3)), Formed(torch.ones(2, 3))])
        tensor([12., 12.])
    """
    examples, size = terms[0].examples, max(1, scratch_entries(terms[0].device) // max(terms[0].entries, 1))
    parts = []
    for first in range(0, examples, size):
        rows = slice(first, first + size)
        total = terms[0].gradients(rows)
        for term in terms[1:]:
            total = total + term.gradients(rows)
        parts.append(total.flatten(1).square().sum(1))
    return torch.cat(parts)


def _padded(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    return F.pad(x, [p for pair in reversed(pads) for p in pair]) if any(map(any, pads)) else x


def _patches(padded: Tensor, first: int, layer: Convolution) -> Tensor:
    """A view with the spatial dimensions (from `first` on) those of the output, and the kernel's dimensions appended."""
    for d, (kernel, stride, dilation) in enumerate(zip(layer.shape[2:], layer.stride, layer.dilation, strict=True)):
        padded = padded.unfold(first + d, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    return padded
