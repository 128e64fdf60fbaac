"""What all gradient transforms share: how one is called in a sentence, and how one is attached to an optimizer.

A transform reads the whole gradient once (`plan`) and then changes it one tensor at a time. Attached, it therefore never holds
more than one extra tensor, and it writes into the existing `.grad` tensors, which may be views of somebody's flat buffer or of
DDP's buckets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradwise.core import compat
from gradwise.core.named_tensors import dense
from gradwise.core.protocols import Gradients, LazyGradient, NamedTensors, names_of
from gradwise.core.search_space import SearchSpace

Change: TypeAlias = Callable[[str, Tensor | LazyGradient], Tensor | LazyGradient]
"""(name, gradient of one parameter) -> its new gradient, a new object of the same shape, dtype and device."""


class GradientTransform(ABC):
    """Base class of transforms: write `plan`, and calling, attaching and the refusal of sparse gradients are there.

    Attributes:
        example: the constructor's arguments without a default, at values that make sense; tests and tools build the transform
            from them.
        search_space: what `compare` may tune.
        traits: what the composition table (`gradwise.core.compat`) must know of it.

    One object serves one optimizer (counters and generators advance at every use). Its state is not part of the optimizer's:
    save `state_dict()` beside it.

    Example:
        >>> class Halve(GradientTransform):
        ...     def plan(self, grads, params):
        ...         return lambda name, grad: 0.5 * grad
        >>> Halve()({"w": torch.ones(2)}, {"w": torch.zeros(2)})
        {'w': tensor([0.5000, 0.5000])}
    """

    example: ClassVar[dict[str, Any]] = {}
    search_space: ClassVar[SearchSpace] = {}
    traits: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def plan(self, grads: Gradients, params: NamedTensors) -> Change:
        """Read the whole gradient and say what is to be done to each of its tensors; advances the state by one step.

        Args:
            grads: the gradient by parameter name; must not be changed.
            params: the parameters by name; may hold names that have no gradient.
        """

    def __call__(self, grads: Gradients, params: NamedTensors) -> Gradients:
        """The transformed gradient under the same names and in the same order; the given one is not changed.

        Raises:
            ValueError: a sparse gradient, by name.
        """
        with torch.no_grad():
            change = self._begin(grads, params)
            return {name: change(name, grad) for name, grad in grads.items()}

    def transform_(self, grads: NamedTensors, params: NamedTensors) -> None:
        """The same numbers written into the given tensors, one at a time; override it where torch can do many at once.

        Raises:
            ValueError: a sparse gradient, by name.
        """
        with torch.no_grad():
            change = self._begin({**grads}, params)
            for name, grad in grads.items():
                grad.copy_(dense(change(name, grad)))

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Transform `.grad` in place before every `optimizer.step()`; `.remove()` on the result ends it.

        Transforms attached to one optimizer run in the order of their attaching, each on all parameters that require a gradient
        and have one. Given `optimizer.step(closure)`, the gradient exists only after the closure has run, so the closure is
        wrapped and every evaluation of it is followed by the transform. Gradients must be whole by then: averaged over ranks
        (as DDP leaves them) and, under mixed precision, unscaled (`GradScaler.step` does that; an optimizer with `fused=True`
        needs `scaler.unscale_(optimizer)` first).

        Raises:
            IncompatibleWords: the optimizer, or a transform attached to it earlier, cannot stand with this one.
            RuntimeError: at the step, when a gradient scaler has left the gradient scaled.
        """
        compat.check(optimizer=optimizer, transforms=[*attached_to(optimizer), self])
        return optimizer.register_step_pre_hook(_BeforeStep(self))

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step and must be saved to resume exactly; `torch.load(weights_only=True)` reads it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`.

        Raises:
            ValueError: the state holds what this transform does not know, or lacks what it needs.
        """
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"state of {type(self).__name__} must have the keys {sorted(expected)}, got {sorted(state)}")

    def _begin(self, grads: Gradients, params: NamedTensors) -> Change:
        self._refuse_sparse(grads)
        return self.plan(grads, params)

    def _refuse_sparse(self, grads: Mapping[str, Tensor | LazyGradient]) -> None:
        for name, grad in grads.items():
            if isinstance(grad, Tensor) and grad.layout != torch.strided:
                raise ValueError(f"the gradient of {name!r} is sparse ({grad.layout}); {type(self).__name__} needs dense gradients")


def attached_to(optimizer: Optimizer) -> list[GradientTransform]:
    """The transforms attached to an optimizer, in the order in which they run.

    Example:
        >>> from gradwise.transforms import ClipNorm
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> handle = ClipNorm(1.0).attach(optimizer)
        >>> [type(transform).__name__ for transform in attached_to(optimizer)]
        ['ClipNorm']
    """
    return [hook.transform for hook in optimizer._optimizer_step_pre_hooks.values() if isinstance(hook, _BeforeStep)]


class _BeforeStep:
    """The step pre-hook of one attached transform."""

    def __init__(self, transform: GradientTransform) -> None:
        self.transform = transform

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        # args[0] is the optimizer itself: torch hands the hook the arguments of the unbound method
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._transform_in_place(optimizer)
            return None

        def evaluate() -> Any:
            loss = closure()
            self._transform_in_place(optimizer)
            return loss

        return ((*args[:1], evaluate, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": evaluate})

    def _transform_in_place(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            word = type(self.transform).__name__
            raise RuntimeError(f"{word}: the gradients are still scaled; call scaler.unscale_(optimizer) before scaler.step")
        params = _parameters(optimizer)
        cleared: set[int] = getattr(optimizer, "cleared_gradients", set)()
        grads: dict[str, Tensor] = {name: p.grad for name, p in params.items() if p.grad is not None and id(p) not in cleared}
        self.transform.transform_(grads, params)


def _parameters(optimizer: Optimizer) -> NamedTensors:
    """Parameters that require a gradient by readable name; two modules in two groups may both have a "weight"."""
    names, params = names_of(optimizer), {}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if p.requires_grad:
                name = names[id(p)]
                params[f"{name} ({i} of group {g})" if name in params else name] = p
    return params
