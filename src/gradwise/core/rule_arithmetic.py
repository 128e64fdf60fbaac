"""The few compound operations that update rules are made of, in the form that is fastest where they run.

Eagerly a hyper-parameter is a Python float and one fused torch operator saves two passes over memory; inside a compiled kernel it is a 0-d
tensor, which the fused operators refuse, and the compiler fuses plain arithmetic anyway. The results agree to rounding. As everywhere in
torch, a trailing underscore says that the first argument is overwritten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def interpolate(a: Tensor, b: Tensor, beta: Any) -> Tensor:
    """beta a + (1 - beta) b.

    Example:
        >>> interpolate(torch.zeros(1), torch.ones(1), 0.75)
        tensor([0.2500])
    """
    return torch.lerp(a, b, 1 - beta) if isinstance(beta, float) else beta * a + (1 - beta) * b


def moving_average_(average: Tensor, x: Tensor, beta: Any) -> Tensor:
    """average <- beta average + (1 - beta) x.

    Example:
        >>> moving_average_(torch.zeros(1), torch.ones(1), 0.75)
        tensor([0.2500])
    """
    return average.lerp_(x, 1 - beta) if isinstance(beta, float) else average.mul_(beta).add_((1 - beta) * x)


def moving_square_(average: Tensor, x: Tensor, beta: Any) -> Tensor:
    """average <- beta average + (1 - beta) x^2.

    Example:
        >>> moving_square_(torch.zeros(1), torch.full((1,), 2.0), 0.75)
        tensor([1.])
    """
    average.mul_(beta)
    return average.addcmul_(x, x, value=1 - beta) if isinstance(beta, float) else average.add_((1 - beta) * x * x)


def step_along_(param: Tensor, direction: Tensor, size: Any) -> Tensor:
    """param <- param - size direction.

    Example:
        >>> step_along_(torch.ones(1), torch.ones(1), 0.25)
        tensor([0.7500])
    """
    return param.sub_(direction, alpha=size) if isinstance(size, float) else param.sub_(size * direction)


def step_along_ratio_(param: Tensor, numerator: Tensor, denominator: Tensor, size: Any) -> Tensor:
    """param <- param - size numerator / denominator.

    Example:
        >>> step_along_ratio_(torch.ones(1), torch.ones(1), torch.full((1,), 2.0), 0.5)
        tensor([0.7500])
    """
    if isinstance(size, float):
        return param.addcdiv_(numerator, denominator, value=-size)
    return param.sub_(size * (numerator / denominator))


def scale_and_shift(x: Tensor, scale: Any, shift: Any) -> Tensor:
    """scale x + shift; x may be overwritten.

    Example:
        >>> scale_and_shift(torch.ones(1), 2.0, 0.5)
        tensor([2.5000])
    """
    return torch.rsub(x, shift, alpha=-scale) if isinstance(scale, float) else x.mul_(scale).add_(shift)
