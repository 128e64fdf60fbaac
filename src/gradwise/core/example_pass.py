"""One forward pass of a batch whose backward passes answer questions about single examples.

The gradient of example i for the weight of a layer y = W x is sum_t (dloss_i/dy_t) x_t^T: it is made of the layer's input and
of the gradient of its output, which one ordinary backward pass of sum_i loss_i brings for all examples at once. So the pass
watches every use of a parameter by an operator that `core.captured_layers` knows, lets a backward pass (that computes no
weight gradient at all) hand over input and output gradient, and keeps only what was asked for, such as N numbers. Parameters
used in any other way are found on the autograd graph and left to `torch.func`, so that the answer is right for every module.

Which dimension of a tensor counts examples is not guessed from shapes, which may agree by chance: the pass first runs the
first example alone, and looks which dimension of every operator's input changes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradwise.core.captured_layers import OPERATORS, ExampleLayout, Reading
from gradwise.core.curvature import graph_nodes
from gradwise.core.example_gradients import ExampleGradients, summed_squared_norms
from gradwise.core.examples import number_of_examples, one_loss_an_example, take_examples
from gradwise.core.protocols import Batch, NamedTensors, Objective, trainable

Visitor = Callable[[str, ExampleGradients], None]
"""Called with a parameter's name and one use's part of the per-example gradients, as the backward pass reaches it."""


class ExamplePass:
    """The losses of a batch, one an example, with the autograd graph to ask about their gradients g_i.

    Args:
        model: any module in a state where examples do not meet: batch statistics are refused.
        objective: (model, batch) -> losses (N,), such as `supervised(nn.CrossEntropyLoss(reduction="none"))`.
        batch: a nest of tensors that share their first dimension, the example.

    Attributes:
        losses: (N,), detached.
        uncovered: names of parameters that need `torch.func`: some use of them is by an operator not listed in
            `core.captured_layers`, or without a dimension that counts examples. Each costs N gradients of its own, but
            `captured` does not.
        captured: names of all other parameters that the losses depend on.

    Raises:
        ValueError: a module uses batch statistics (it is named), the objective does not return one loss an example, or the first
            example's loss is another one when it is alone, so that examples meet somewhere (not checked where random numbers are
            drawn).

    Example:
        >>> from gradwise.core.protocols import supervised
        >>> model = nn.Linear(2, 1, bias=False)
        >>> one_each = supervised(lambda output, target: output.squeeze(1) * target)
        >>> run = ExamplePass(model, one_each, (torch.tensor([[3.0, 4.0], [6.0, 8.0]]), torch.ones(2)))
        >>> run.squared_norms()
        {'weight': tensor([ 25., 100.])}
        >>> run.weighted_sum(torch.tensor([1.0, 0.5]))
        {'weight': tensor([[6., 8.]])}
    """

    def __init__(self, model: nn.Module, objective: Objective, batch: Batch) -> None:
        refuse_batch_statistics(model)
        self.model, self.objective, self.batch = model, objective, batch
        self.examples = number_of_examples(batch)
        self.parameters = trainable(model)
        names = {id(p): name for name, p in self.parameters.items()}
        probe = _Tape(names)
        with _same_randomness(model) as drawn, torch.no_grad(), probe:
            alone = objective(model, _other_size(batch, self.examples))
        self._tape = _Tape(names)
        with torch.enable_grad():
            with self._tape:
                losses = objective(model, batch)
            self._losses = one_loss_an_example(losses, self.examples, "objective")
        self.losses = self._losses.detach()
        _refuse_mixing(self.losses, alone, drawn())
        used, outside = _uses_on_graph(self._losses, names, self._tape)
        unclear = _locate_examples(self._tape.uses, probe.uses, self.examples)
        self.uncovered = sorted(used & (outside | unclear))
        self.captured = sorted(used - set(self.uncovered))

    def visit(self, visitor: Visitor, *, retain_graph: bool = True) -> None:
        """One backward pass of the sum of losses; every captured use of a parameter is handed over as soon as its gradient arrives.

        Args:
            visitor: sees each use once, in backward order; a parameter used several times comes several times.
            retain_graph: keep the graph for another question. Without, memory is freed as the pass goes.

        Example:
            >>> run = ExamplePass(nn.Linear(2, 1), lambda model, x: model(x).squeeze(1), torch.ones(3, 2))
            >>> run.visit(lambda name, terms: print(name, tuple(terms.gradients(slice(0, 3)).shape)))
            weight (3, 1, 2)
            bias (3, 1)
        """
        captured = set(self.captured)

        def arrived(use: _Use, input: Tensor, slope: Tensor) -> None:
            if use.layout is None:
                return
            input, slope = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (input, slope))
            for name, gradients in use.gradients.items():
                if name in captured:
                    visitor(name, gradients(use.layout, input, slope))

        if not self._losses.requires_grad:
            return
        self._tape.visitor = arrived
        try:
            ones = torch.ones_like(self._losses)
            torch.autograd.grad(self._losses, self._tape.anchor, ones, retain_graph=retain_graph, allow_unused=True)
        finally:
            self._tape.visitor = None

    def squared_norms(self, *, retain_graph: bool = True) -> NamedTensors:
        """||g_i||^2 by captured parameter, (N,) each, at least float32.

        A use's norms are taken as it arrives; only a parameter used several times waits, as its uses must be added before squaring.

        Example:
            >>> run = ExamplePass(nn.Linear(2, 1), lambda model, x: model(x).squeeze(1), torch.ones(3, 2))
            >>> run.squared_norms()["weight"]
            tensor([2., 2., 2.])
        """
        expected = self._tape.counts()
        found: NamedTensors = {}
        waiting: dict[str, list[ExampleGradients]] = {}

        def reduce(name: str, terms: ExampleGradients) -> None:
            if expected[name] == 1:
                found[name] = terms.squared_norms()
            else:
                waiting.setdefault(name, []).append(terms)

        self.visit(reduce, retain_graph=retain_graph)
        found |= {name: summed_squared_norms(terms) for name, terms in waiting.items()}
        return {name: found[name] for name in self.parameters if name in found}

    def weighted_sum(self, weights: Tensor, *, retain_graph: bool = True) -> NamedTensors:
        """sum_i weights_i g_i for every parameter (zeros where the losses do not depend on it): one backward pass, on the same
        graph.

        Args:
            weights: (N,).
            retain_graph: as in `visit`.

        Raises:
            ValueError: the weights are not of shape (N,).

        Example:
            >>> run = ExamplePass(nn.Linear(2, 1), lambda model, x: model(x).squeeze(1), torch.ones(3, 2))
            >>> run.weighted_sum(torch.tensor([1.0, 2.0, 3.0]))["bias"]
            tensor([6.])
        """
        if weights.shape != (self.examples,):
            raise ValueError(f"weights must be one an example, shape ({self.examples},), got {tuple(weights.shape)}")
        if not self._losses.requires_grad:
            return {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        found = torch.autograd.grad(
            self._losses, list(self.parameters.values()), weights.detach().to(self._losses), retain_graph=retain_graph,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return dict(zip(self.parameters, found, strict=True))


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise if some module normalises by statistics of the batch, which makes every loss depend on every example.

    Raises:
        ValueError: naming the modules.

    Example:
        >>> refuse_batch_statistics(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))
        Traceback (most recent call last):
        ValueError: per-example gradients do not exist with batch statistics: put BatchNorm1d '1' into eval mode ...
    """
    found = [
        f"{type(module).__name__} {name!r}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]
    if found:
        raise ValueError(
            f"per-example gradients do not exist with batch statistics: put {', '.join(found)} into eval mode "
            "(with running statistics) or replace it by GroupNorm"
        )


@dataclass
class _Use:
    """One call of a captured operator: what its tap in the graph needs to know."""

    operator: Any
    input: Tensor | None
    shape: torch.Size
    axes: list[int]
    gradients: dict[str, Callable[[ExampleLayout, Tensor, Tensor], ExampleGradients]]
    layout: ExampleLayout | None = None


@dataclass
class _Tape(TorchFunctionMode):
    """Records uses of parameters during the forward pass; with gradients on, puts a tap behind each of them."""

    names: dict[int, str]
    uses: list[_Use] = field(default_factory=list)
    aliases: set[Any] = field(default_factory=set)
    anchor: Tensor = field(default_factory=lambda: torch.empty(0, requires_grad=True))
    visitor: Callable[[_Use, Tensor, Tensor], None] | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def counts(self) -> dict[str, int]:
        return {name: sum(name in use.gradients for use in self.uses) for name in self.names.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _SEEN_THROUGH(*args, **kwargs)
        read = OPERATORS.get(func)
        reading: Reading | None = read(*args, **kwargs) if read else None
        owned = [(p, make) for p, make in reading.parameters if id(p) in self.names] if reading else []
        if reading is None or not owned:
            return func(*args, **kwargs)
        gradients = {self.names[id(p)]: make for p, make in owned}
        use = _Use(func, reading.input.detach(), reading.input.shape, list(reading.axes), gradients)
        self.uses.append(use)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        # The operator gets aliases, so that any other use of the parameter shows on the graph as an edge that is not an alias's.
        alias = {id(p): p.view_as(p) for p, _ in owned}
        self.aliases |= {a.grad_fn for a in alias.values()}
        swap = lambda value: alias.get(id(value), value)  # noqa: E731
        output = func(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})
        return _Tap.apply(output, use.input, self.anchor, self, use)


class _Tap(torch.autograd.Function):
    """The identity, in place; in the backward pass it shows the operator's input and the gradient of its output to the visitor."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, input: Tensor, anchor: Tensor, tape: _Tape, use: _Use) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(input)
        ctx.tape, ctx.use = tape, use
        return output

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.tape.visitor is not None:
            ctx.tape.visitor(ctx.use, ctx.saved_tensors[0], slope)
        return slope, None, None, None, None


# Attention calls F.linear on its own projections, behind a check that hides them from function modes: the same code without
# the check.
_SEEN_THROUGH = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _other_size(batch: Batch, examples: int) -> Batch:
    """The first example alone, or twice if it is the only one: a batch of another size whose examples are known."""
    return take_examples(batch, slice(0, 1)) if examples > 1 else take_examples(batch, torch.zeros(2 * examples, dtype=torch.long))


@contextmanager
def _same_randomness(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Leave the global generators as they were (dropout in train mode draws from them); yields whether they were drawn from."""
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

    before: list[Tensor] = states()
    after: list[Tensor] = []
    with torch.random.fork_rng(devices=devices):
        yield lambda: not all(map(torch.equal, before, after))
        after += states()


def _refuse_mixing(losses: Tensor, alone: Tensor, random: bool) -> None:
    """Raise if the first example's loss depends on company, beyond what other kernels for another size explain."""
    if random or not len(losses) or alone.ndim != 1:
        return
    first, lone = losses[0].double(), alone[0].double()
    if bool((first - lone).abs() > 1e-3 + 0.05 * lone.abs()):
        raise ValueError(
            f"the first example's loss is {float(first):.4g} in the batch but {float(lone):.4g} alone: examples meet somewhere in "
            "the model or the objective, so that no gradient is one example's own"
        )


def _uses_on_graph(losses: Tensor, names: dict[int, str], tape: _Tape) -> tuple[set[str], set[str]]:
    """Names of the parameters that the losses depend on, and of those that reach them other than through a captured operator."""
    used: set[str] = set()
    outside: set[str] = set()
    for node in graph_nodes([losses]):
        for parent, _ in node.next_functions:
            name = names.get(id(getattr(parent, "variable", None)))
            if name is not None:
                used.add(name)
                if node not in tape.aliases:
                    outside.add(name)
    return used, outside


def _locate_examples(uses: list[_Use], probe: list[_Use], examples: int) -> set[str]:
    """Set each use's layout from how its input's shape differs in the probe; returns the parameters where that cannot be said."""
    same = [(use.operator, use.gradients.keys()) for use in uses] == [(use.operator, use.gradients.keys()) for use in probe]
    unclear: set[str] = set()
    for i, use in enumerate(uses):
        use.layout = _layout(use, probe[i], examples) if same else None
        use.input = None
        if use.layout is None:
            unclear |= use.gradients.keys()
    return unclear


def _layout(use: _Use, alone: _Use, examples: int) -> ExampleLayout | None:
    others = 1 if examples > 1 else 2
    if use.input is None or alone.input is None or len(use.shape) != len(alone.shape):
        return None
    changed = [d for d, (a, b) in enumerate(zip(use.shape, alone.shape, strict=True)) if a != b]
    if len(changed) != 1 or changed[0] not in use.axes:
        return None
    axis = changed[0]
    size, size_alone = use.shape[axis], alone.shape[axis]
    if size % examples or size * others != size_alone * examples:
        return None
    if size == examples or examples == 1:
        return ExampleLayout(axis, examples)
    # k entries an example: consecutive or strided is told by the numbers of the first example.
    full, single = use.input.movedim(axis, 0), alone.input.movedim(axis, 0)
    tolerance = 1e-3 if full.dtype in (torch.float32, torch.float64) else 3e-2
    scale = single.double().square().mean()
    candidates = (full[: size // examples], full[::examples])
    major, strided = (bool((rows.double() - single.double()).square().mean() <= tolerance**2 * scale) for rows in candidates)
    return ExampleLayout(axis, examples, major) if major != strided else None
