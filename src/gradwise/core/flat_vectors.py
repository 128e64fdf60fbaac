"""Tensors by name as one flat vector and back: Krylov methods do their own arithmetic on flat vectors, and products on names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gradwise.core.named_tensors import same_names
from gradwise.core.protocols import NamedTensors


class FlatVectors:
    """The two-way map between tensors by name and vectors of shape (P,), or (B, P) when batched along the first dimension.

    Flat vectors have one dtype, at least float32, so that sums over bfloat16 parameters keep their digits; going back restores each
    tensor's own dtype and device.

    Args:
        like: names, shapes, dtypes and devices.
        batched: whether the first dimension of every tensor counts vectors.

    Attributes:
        size: P.
        dtype: of the flat vectors.

    Example:
        >>> vectors = FlatVectors({"a": torch.zeros(1, 2, dtype=torch.bfloat16), "b": torch.zeros(1)})
        >>> vectors.size, vectors.dtype
        (3, torch.float32)
        >>> vectors.unpack(torch.arange(3.0))["b"]
        tensor([2.])
    """

    def __init__(self, like: Mapping[str, Tensor], batched: bool = False) -> None:
        self.batched = batched
        self.shapes = {name: t.shape[int(batched) :] for name, t in like.items()}
        self.kinds = {name: (t.dtype, t.device) for name, t in like.items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.size = sum(self.sizes)
        self.dtype = functools.reduce(torch.promote_types, (t.dtype for t in like.values()), torch.float32)

    def pack(self, named: Mapping[str, Tensor]) -> Tensor:
        """A new flat vector with the numbers of `named`.

        Raises:
            ValueError: names or sizes differ from `like`'s.

        Example:
            >>> FlatVectors({"a": torch.zeros(2)}).pack({"a": torch.ones(2)})
            tensor([1., 1.])
        """
        same_names(self.shapes, named)
        lead = int(self.batched)
        for name, shape in self.shapes.items():
            if named[name].shape[lead:] != shape:
                raise ValueError(f"{name!r} must have shape {tuple(shape)}, got {tuple(named[name].shape[lead:])}")
        if not self.shapes:
            return torch.empty(0)
        first = next(iter(self.kinds.values()))[1]
        sizes = zip((named[name].detach() for name in self.shapes), self.sizes, strict=True)
        return torch.cat([t.reshape([*t.shape[:lead], size]).to(first, self.dtype) for t, size in sizes], -1)

    def unpack(self, flat: Tensor) -> NamedTensors:
        """Vectors (..., P) by name, (..., *shape) each; views of `flat` where dtype and device allow.

        Example:
            >>> FlatVectors({"a": torch.zeros(2, 1)}).unpack(torch.ones(5, 2))["a"].shape
            torch.Size([5, 2, 1])
        """
        named = {}
        for (name, shape), part in zip(self.shapes.items(), flat.split(self.sizes, -1), strict=True):
            dtype, device = self.kinds[name]
            named[name] = part.view([*part.shape[:-1], *shape]).to(device, dtype)
        return named


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The real part of <a, b> over the last dimension, one number a vector.

    Example:
        >>> inner(torch.ones(2, 3), torch.ones(2, 3))
        tensor([3., 3.])
    """
    product: Tensor = torch.linalg.vecdot(a, b)
    return product.real if product.is_complex() else product


Distribution: TypeAlias = Literal["rademacher", "normal"]


def random_vector(
    like: Mapping[str, Tensor], distribution: Distribution = "rademacher", generator: torch.Generator | None = None
) -> NamedTensors:
    """Independent entries of mean 0 and variance 1, drawn in the order of the names.

    Args:
        like: names, shapes, dtypes and devices.
        distribution: "rademacher" (each +1 or -1) or "normal".
        generator: on any device; the numbers are drawn there and moved, so one generator gives one vector wherever the
            parameters live.

    Raises:
        ValueError: the distribution is unknown.

    Example:
        >>> random_vector({"w": torch.zeros(100)}, generator=torch.Generator().manual_seed(0))["w"].abs().unique()
        tensor([1.])
    """
    if distribution not in ("rademacher", "normal"):
        raise ValueError(f'distribution must be "rademacher" or "normal", got {distribution!r}')

    def draw(t: Tensor) -> Tensor:
        device = t.device if generator is None else generator.device
        if distribution == "normal":
            return torch.randn(t.shape, dtype=t.dtype, device=device, generator=generator).to(t.device)
        signs = torch.randint(2, t.shape, dtype=torch.int8, device=device, generator=generator).to(t.device)
        return signs.to(t.dtype).mul_(2).sub_(1)

    return {name: draw(t) for name, t in like.items()}
