"""What a step costs, counted and never assumed: forwards, backwards, bytes, seconds, peak memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradwise.core.protocols import Batch, Gradients, Objective


class CostMeter:
    """Counts passes through a model, forwards and backwards, while an objective is evaluated.

    Counted at the model's own output, so that an objective that runs the model many times (on adversarial examples, on two views) is
    charged for each, and a model called once inside `vmap` or with checkpointed blocks for one. An objective that never calls the model
    as a whole counts as one pass an evaluation.

    Attributes:
        forwards: passes through the model.
        backwards: times that a backward pass came through the output of one of them.

    Example:
        >>> meter = CostMeter()
        >>> objective = meter.counted(lambda model, batch: model(batch).sum() + model(-batch).sum())
        >>> objective(nn.Linear(2, 1), torch.ones(3, 2)).backward()
        >>> meter.forwards, meter.backwards
        (2, 2)
    """

    def __init__(self) -> None:
        self._evaluations: list[_Evaluation] = []

    @property
    def forwards(self) -> int:
        return sum(max(1, e.calls) for e in self._evaluations)

    @property
    def backwards(self) -> int:
        return sum(max(1, len(calls)) for e in self._evaluations for calls in e.came_through.values())

    def counted(self, objective: Objective) -> Objective:
        """The same objective, counted."""

        def evaluate(model: nn.Module, batch: Batch) -> Tensor:
            evaluation = _Evaluation()
            self._evaluations.append(evaluation)
            with evaluation.watching(model):
                loss = objective(model, batch)
            if isinstance(loss, Tensor) and loss.requires_grad:
                evaluation.watch_loss(loss)
            return loss

        return evaluate


class _Evaluation:
    """What one evaluation of an objective has run; hooks keep writing here during the backward passes."""

    def __init__(self) -> None:
        self.calls = 0
        self.came_through: dict[int, set[int]] = {}
        """By backward run, the calls of the model whose output it came through: none where the loss reaches parameters another way."""

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        hookable = isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule)
        handle = model.register_forward_hook(self._called) if hookable else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def watch_loss(self, loss: Tensor) -> None:
        loss.register_hook(lambda grad: self._run())

    def _called(self, model: nn.Module, args: Any, output: Any) -> None:
        call = self.calls
        self.calls += 1
        for t in _tensors(output):
            if t.grad_fn is not None:  # a hook on a leaf would outlive the step
                t.register_hook(lambda grad: self._run(call))

    def _run(self, *calls: int) -> None:
        self.came_through.setdefault(torch._C._current_graph_task_id(), set()).update(calls)


def gradient_bytes(grads: Gradients) -> int:
    """Bytes of a gradient as a message: what one data-parallel worker would send.

    Dense tensors send their entries, sparse ones the indices and values of the rows they touch. Seeded gradients send their pairs of seed
    and coefficient, and those that tensors share only once: a whole model's two-sided estimate is one pair, 16 bytes.

    Example:
        >>> gradient_bytes({"w": torch.zeros(10)})
        40
        >>> from gradwise.core.seeded import SeededGradient
        >>> gradient_bytes({n: SeededGradient(n, ((7, 0.5),), torch.Size([99]), torch.float32, torch.device("cpu")) for n in "wb"})
        16
    """
    recipes: dict[Any, int] = {}
    total = 0
    for name, g in grads.items():
        if not isinstance(g, Tensor):
            recipes[getattr(g, "terms", name)] = g.wire_bytes
        elif g.is_sparse:
            total += g.coalesce().indices().nbytes + g.coalesce().values().nbytes
        else:
            total += g.numel() * g.element_size()
    return total + sum(recipes.values())


def tensor_bytes(value: Any) -> int:
    """Bytes of all distinct tensors in a nest of dicts, lists and tensors: a tensor met twice counts once, a view as what it shows.

    Example:
        >>> x = torch.zeros(10)
        >>> tensor_bytes({"a": x, "b": [x, torch.zeros(2)]})
        48
    """
    seen: dict[tuple[int, int], int] = {}

    def visit(v: Any) -> None:
        if isinstance(v, Tensor):
            seen[v.data_ptr(), v.numel()] = v.numel() * v.element_size()
        elif isinstance(v, dict):
            visit(list(v.values()))
        elif isinstance(v, Iterable) and not isinstance(v, str):
            for x in v:
                visit(x)

    visit(value)
    return sum(seen.values())


class PeakMemory(TorchDispatchMode):
    """Peak bytes of tensors created inside the block and alive at once, counted storage by storage.

    Exact on any device and repeatable, unlike a process's resident memory, at the price of slowing the block down: measure one step, not a
    training. Scratch memory inside a kernel is not seen.

    Example:
        >>> with PeakMemory() as memory:
        ...     x = torch.zeros(1000)
        ...     y = x + 1
        ...     del x
        ...     z = torch.zeros(10)
        >>> memory.peak
        8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is not Tensor and t is not nn.Parameter for t in types):
            # a tensor subclass (a perturbed parameter, say) computes first; the operators it calls come back here and count
            return NotImplemented
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            storage = t.untyped_storage()
            key = storage._cdata
            if key in given or key in self._known:
                continue
            size = storage.nbytes()
            self._known[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def _tensors(nest: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(nest) if isinstance(x, Tensor)]
