"""Arithmetic on dictionaries of tensors: the vectors that estimators, transforms and curvature products speak.

Every function returns new tensors under the same names and in the same order. Lazy gradients are made into tensors one at a time, so that
no function here ever holds more than one of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradwise.core.protocols import LazyGradient, NamedTensors


def dense(value: Tensor | LazyGradient) -> Tensor:
    """The tensor itself, or what a lazy gradient stands for.

    Example:
        >>> dense(torch.ones(2))
        tensor([1., 1.])
    """
    return value if isinstance(value, Tensor) else value.materialize()


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float = 1.0) -> NamedTensors:
    """a + alpha b, name by name.

    Raises:
        ValueError: the names of a and b differ.

    Example:
        >>> add({"w": torch.ones(2)}, {"w": torch.ones(2)}, alpha=2.0)
        {'w': tensor([3., 3.])}
    """
    same_names(a, b)
    return {name: torch.add(a[name], b[name], alpha=alpha) for name in a}


def scale(a: Mapping[str, Any], factor: float | Tensor) -> dict[str, Any]:
    """factor * a, name by name; lazy gradients stay lazy.

    Example:
        >>> scale({"w": torch.ones(2)}, 3.0)
        {'w': tensor([3., 3.])}
    """
    return {name: (x * factor if isinstance(x, Tensor) else x.scaled(factor)) for name, x in a.items()}


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """The inner product <a, b> over all names, a 0-d tensor; low-precision tensors are summed in float32.

    Raises:
        ValueError: the names of a and b differ.

    Example:
        >>> float(dot({"w": torch.ones(3)}, {"w": torch.full((3,), 2.0)}))
        6.0
    """
    same_names(a, b)
    return _total([torch.dot(_wide(a[name]).flatten(), _wide(b[name]).flatten()) for name in a])


def norm(a: Mapping[str, Any], order: float = 2.0) -> Tensor:
    """The norm of all entries together, a 0-d tensor; low-precision tensors are summed in float32.

    Args:
        a: tensors (dense or COO) or lazy gradients by name; an empty dict has norm 0.
        order: 1, 2 or inf (any p >= 1 works).

    Example:
        >>> float(norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}))
        5.0
    """
    low = (torch.float16, torch.bfloat16)
    stored = (x.coalesce().values() if isinstance(x, Tensor) and x.is_sparse else x for x in a.values())
    values = [x for x in stored if x.shape.numel()]  # torch has no infinity norm of no entries
    at_once = [x for x in values if isinstance(x, Tensor) and x.dtype not in low]
    one_by_one = [x for x in values if not isinstance(x, Tensor) or x.dtype in low]
    parts = list(torch._foreach_norm(at_once, order)) if at_once else []
    parts += [torch.linalg.vector_norm(_wide(dense(x)), order) for x in one_by_one]
    return torch.linalg.vector_norm(torch.stack([p.to(parts[0].device) for p in parts]), order) if parts else torch.tensor(0.0)


def zeros_like(a: Mapping[str, Any]) -> NamedTensors:
    """Zeros of the same shapes.

    Example:
        >>> zeros_like({"w": torch.ones(2)})
        {'w': tensor([0., 0.])}
    """
    return {name: torch.zeros(x.shape, dtype=x.dtype, device=x.device) for name, x in a.items()}


def randn_like(a: Mapping[str, Tensor], generator: torch.Generator | None = None) -> NamedTensors:
    """Standard normal entries of the same shapes, drawn in the order of the names.

    Example:
        >>> randn_like({"w": torch.ones(2)}, torch.Generator().manual_seed(0))["w"].shape
        torch.Size([2])
    """
    return {n: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) for n, x in a.items()}


def flatten(a: Mapping[str, Tensor]) -> Tensor:
    """All entries in one vector, in the order of the names.

    Example:
        >>> flatten({"a": torch.ones(1, 2), "b": torch.zeros(1)})
        tensor([1., 1., 0.])
    """
    return torch.cat([x.reshape(-1) for x in a.values()]) if a else torch.empty(0)


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> NamedTensors:
    """The inverse of `flatten`: cut `vector` into the names and shapes of `like`.

    Raises:
        ValueError: the vector's length is not the number of entries of `like`.

    Example:
        >>> unflatten(torch.arange(3.0), {"a": torch.ones(1, 2), "b": torch.zeros(1)})
        {'a': tensor([[0., 1.]]), 'b': tensor([2.])}
    """
    sizes = [x.numel() for x in like.values()]
    if vector.ndim != 1 or vector.numel() != sum(sizes):
        raise ValueError(f"vector must have shape ({sum(sizes)},) to be cut into {len(sizes)} tensors, got {tuple(vector.shape)}")
    parts = vector.split(sizes)
    return {name: part.view(x.shape) for part, (name, x) in zip(parts, like.items(), strict=True)}


def same_names(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Check that two dictionaries speak of the same parameters.

    Raises:
        ValueError: naming what only one of them has.

    Example:
        >>> same_names({"w": 1}, {"w": 2})
    """
    if a.keys() != b.keys():
        raise ValueError(f"names differ: only in the first {sorted(a.keys() - b.keys())}, only in the second {sorted(b.keys() - a.keys())}")


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack([p.to(parts[0].device) for p in parts]).sum() if parts else torch.tensor(0.0)
