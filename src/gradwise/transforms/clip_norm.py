"""Clipping by the norm of the whole gradient: every entry is multiplied by the same number, so the direction stays.

The step of a rare huge gradient becomes as long as that of an ordinary one instead of throwing the parameters far away (Pascanu
et al. 2013).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradwise.core.named_tensors import norm
from gradwise.core.protocols import Gradients, LazyGradient, NamedTensors
from gradwise.core.search_space import LogUniform, SearchSpace
from gradwise.core.transform import Change, GradientTransform


class ClipNorm(GradientTransform):
    """g <- g min(1, max_norm / (||g||_p + 1e-6)), with the norm over all entries of all tensors together.

    The same numbers as `torch.nn.utils.clip_grad_norm_`, its 1e-6 included: a clipped gradient ends a factor ||g|| / (||g|| +
    1e-6) below max_norm, and one whose norm lies within 1e-6 under max_norm shrinks by as little. The norm of half-precision
    gradients is summed and kept in float32. Lazy gradients stay lazy. A norm that is infinite or NaN gives zeros and NaNs, as
    in torch, unless an error is asked for.

    Args:
        max_norm: the largest norm let through, >= 0; inf only measures.
        order: p of the norm, >= 1; `math.inf` is the largest magnitude.
        error_if_nonfinite: raise when the norm is infinite or NaN.

    Attributes:
        last_norm: norm of the last gradient before it was clipped, a 0-d tensor; None before the first.

    Raises:
        ValueError: max_norm < 0 or NaN, order < 1 or NaN; at use, a sparse gradient (by name).
        RuntimeError: at use, a norm that is not finite, with `error_if_nonfinite`.

    Example:
        >>> clip = ClipNorm(1.0)
        >>> clip({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, {})
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
        >>> clip.last_norm
        tensor(5.)

    Source: Pascanu, Mikolov, Bengio 2013 (arXiv 1211.5063), algorithm 1, which rescales by max_norm / ||g|| without the 1e-6.
    """

    example: ClassVar[dict[str, Any]] = {"max_norm": 1.0}
    search_space: ClassVar[SearchSpace] = {"max_norm": LogUniform(0.1, 10.0)}
    traits: ClassVar[tuple[str, ...]] = ("clips",)

    def __init__(self, max_norm: float, order: float = 2.0, *, error_if_nonfinite: bool = False) -> None:
        if not max_norm >= 0:
            raise ValueError(f"max_norm must be at least 0, got {max_norm}")
        if not order >= 1:
            raise ValueError(f"order must be at least 1 (inf included), got {order}")
        self.max_norm, self.order, self.error_if_nonfinite = float(max_norm), float(order), error_if_nonfinite
        self.last_norm: Tensor | None = None

    def plan(self, grads: Gradients, params: NamedTensors) -> Change:
        """The one factor of all tensors."""
        factor = self._factor(grads)

        def change(name: str, grad: Tensor | LazyGradient) -> Tensor | LazyGradient:
            if not isinstance(grad, Tensor):
                return grad.scaled(factor)
            return torch.mul(grad, factor.to(grad.device)).to(grad.dtype)

        return change

    def transform_(self, grads: NamedTensors, params: NamedTensors) -> None:
        """The same in place, all tensors of a device at once."""
        self._refuse_sparse(grads)
        with torch.no_grad():
            factor = self._factor(grads)
            for device in {grad.device for grad in grads.values()}:
                torch._foreach_mul_([grad for grad in grads.values() if grad.device == device], factor.to(device))

    def _factor(self, grads: Mapping[str, Tensor | LazyGradient]) -> Tensor:
        self.last_norm = total = norm(grads, self.order)
        if self.error_if_nonfinite and not math.isfinite(total):
            raise RuntimeError(f"the gradient's norm of order {self.order} is {float(total)}: it cannot be clipped")
        # no `if total > max_norm`: asking would make a GPU wait at every step
        return (self.max_norm / (total + 1e-6)).clamp(max=1.0)
