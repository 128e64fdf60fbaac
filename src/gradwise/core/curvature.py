"""Curvature as products: the Hessian or the Gauss-Newton matrix times a vector, never as a matrix (Fisher: `core.fisher`).

Every product has the form `product(function, params, batch, vector)`, so that `functools.partial(product, function, params,
batch)` is a `Matvec`, which is all that `core.krylov`, `core.conjugate_gradient` and `core.hutchinson` ask for. A vector is a
`dict[str, Tensor]` with the names and shapes of `params`, and so is the result.

A derivative along a vector is cheapest in forward mode (a Jacobian-vector product costs about one more forward pass).
Operators without a forward rule (fused recurrent layers, some custom functions) fall back to reverse mode, which gets the same
numbers from a second backward pass: J v is the derivative of u -> <J^T u, v>. Fused attention kernels have neither; inside
these products attention runs its plain kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradwise.core.examples import number_of_examples
from gradwise.core.named_tensors import add, same_names, scale
from gradwise.core.protocols import Batch, LossFunction, NamedTensors

Matvec: TypeAlias = Callable[[NamedTensors], NamedTensors]
"""A linear map on tensors by name: what a curvature product is once its function, parameters and batch are fixed."""

ModelFunction: TypeAlias = Callable[[NamedTensors, Batch], Tensor]
"""(parameters, batch) -> output tensor: a model as a pure function of its parameters."""

Mode: TypeAlias = Literal["auto", "forward", "reverse"]
_T = TypeVar("_T")


def hvp(loss_fn: LossFunction, params: NamedTensors, batch: Batch, vector: NamedTensors, *, mode: Mode = "auto") -> NamedTensors:
    """The Hessian of the loss times a vector, H v with H = grad^2 loss(params): the derivative of the gradient along v.

    Costs 2 to 3 gradients and no matrix. The loss must be the same function at every call (no dropout), else the products of
    one run do not belong to one matrix.

    Args:
        loss_fn: (params, batch) -> scalar, such as `core.protocols.loss_function(model, objective)` makes of any `nn.Module`.
        params: where the Hessian is taken; its names may be a subset of the model's, which selects a diagonal block.
        batch: passed on to `loss_fn`.
        vector: names and shapes of `params`.
        mode: "forward" (forward over reverse), "reverse" (reverse over reverse, any operator that has a second derivative), or
            "auto": forward, and reverse where that is not implemented.

    Raises:
        ValueError: the vector does not match the parameters, the loss is not a scalar, or the mode is unknown.
        RuntimeError: an operator has no second derivative (a note says what to do).

    Example:
        >>> loss = lambda params, batch: (params["w"] ** 3).sum()
        >>> hvp(loss, {"w": torch.tensor([1.0, 2.0])}, None, {"w": torch.tensor([1.0, 1.0])})
        {'w': tensor([ 6., 12.])}

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    vector = _like(vector, params)

    def forward() -> NamedTensors:
        gradient = torch.func.grad(lambda p: _scalar(loss_fn(p, batch)))
        return torch.func.jvp(gradient, (_detached(params),), (vector,))[1]

    return _first_that_works(mode, forward, lambda: hessian_operator(loss_fn, params, batch)(vector))


def hessian_operator(loss_fn: LossFunction, params: NamedTensors, batch: Batch) -> Matvec:
    """The Hessian at one point as a `Matvec` that keeps the gradient's graph: for many products of one Hessian (Lanczos, CG).

    Each product is then a single backward pass, about half the time of `hvp`, for the memory of the graph, which lives as long
    as the operator. Works with any operator that has a second derivative.

    Args:
        loss_fn, params, batch: as in `hvp`.

    Raises:
        ValueError: as in `hvp`.
        RuntimeError: an operator has no second derivative.

    Example:
        >>> matvec = hessian_operator(lambda params, batch: (params["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])}, None)
        >>> matvec({"w": torch.tensor([1.0, 1.0])})
        {'w': tensor([ 6., 12.])}
    """
    with torch.enable_grad(), _plain_kernels():
        leaves = _leaves(params)
        grads = _gradient(_scalar(loss_fn(leaves, batch)), leaves, create_graph=True)
    if any(node.name() == "torch::autograd::Error" for node in graph_nodes(grads.values())):
        raise RuntimeError("a custom function is once_differentiable: its part of the second derivative would silently be zero")
    # Where the loss is linear the gradient is a constant, and its row of the Hessian is zero.
    curved = [name for name, grad in grads.items() if grad.requires_grad]

    def matvec(vector: NamedTensors) -> NamedTensors:
        vector = _like(vector, params)
        if not curved:
            return {name: torch.zeros_like(v) for name, v in vector.items()}
        found = torch.autograd.grad(
            [grads[name] for name in curved], list(leaves.values()), [vector[name] for name in curved],
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return dict(zip(leaves, found, strict=True))

    return matvec


def ggn_product(
    model_fn: ModelFunction,
    loss_on_output: Callable[[Tensor, Batch], Tensor],
    params: NamedTensors,
    batch: Batch,
    vector: NamedTensors,
    *,
    mode: Mode = "auto",
) -> NamedTensors:
    """The generalised Gauss-Newton matrix times a vector, G v = J^T H_out J v.

    J is the Jacobian of the model's output with respect to the parameters, H_out the Hessian of the loss with respect to the
    output. G is the Hessian without the curvature of the model itself: positive semidefinite whenever the loss is convex in the
    output, and equal to the true Fisher matrix when the loss is the negative log-likelihood of an exponential family in its
    natural parameters (cross-entropy of logits, half the squared error).

    Args:
        model_fn: (params, batch) -> output, a tensor of any shape, such as
            `lambda p, batch: torch.func.functional_call(model, p, (batch[0],))`.
        loss_on_output: (output, batch) -> scalar, such as `lambda output, batch: cross_entropy(output, batch[1])`.
        params, batch, vector, mode: as in `hvp`.

    Raises:
        ValueError, RuntimeError: as in `hvp`.

    Example:
        >>> model = lambda params, x: x * params["w"]
        >>> loss = lambda output, x: output.square().sum()
        >>> ggn_product(model, loss, {"w": torch.tensor(1.0)}, torch.tensor([1.0, 2.0]), {"w": torch.tensor(1.0)})
        {'w': tensor(10.)}

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """
    output, tangent = jvp(lambda p: model_fn(p, batch), params, vector, mode=mode)
    bent = hvp(lambda p, b: loss_on_output(p["output"], b), {"output": output}, batch, {"output": tangent}, mode=mode)
    return vjp(lambda p: model_fn(p, batch), params, bent["output"], mode=mode)


def over_batches(
    product: Callable[[Batch, NamedTensors], NamedTensors], batches: Sequence[Batch], weights: Sequence[float] | None = None
) -> Matvec:
    """The product over a whole data set, one batch at a time: v -> sum_b weight_b product(batch_b, v) / sum_b weight_b.

    Args:
        product: (batch, vector) -> vector, such as `functools.partial(hvp, loss_fn, params)`.
        batches: held and walked through at every product, so a list (a shuffling loader would give a different matrix each time).
        weights: one a batch; by default its number of examples, which is right for mean losses even if the last batch is smaller.

    Raises:
        ValueError: no batches, or not one weight a batch.

    Example:
        >>> product = over_batches(lambda x, v: {"w": x.mean() * v["w"]}, [torch.tensor([1.0, 2.0]), torch.tensor([6.0])])
        >>> product({"w": torch.tensor(1.0)})
        {'w': tensor(3.)}
    """
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    sizes = [float(number_of_examples(b)) for b in batches] if weights is None else [float(w) for w in weights]
    if len(sizes) != len(batches):
        raise ValueError(f"weights must be one a batch, got {len(sizes)} for {len(batches)} batches")

    def matvec(vector: NamedTensors) -> NamedTensors:
        total = scale(product(batches[0], vector), sizes[0] / sum(sizes))
        for batch, size in zip(batches[1:], sizes[1:], strict=True):
            total = add(total, product(batch, vector), alpha=size / sum(sizes))
        return total

    return matvec


def jvp(
    fn: Callable[[NamedTensors], Tensor], params: NamedTensors, vector: NamedTensors, *, mode: Mode = "auto"
) -> tuple[Tensor, Tensor]:
    """The output of `fn` and its derivative along a vector, (fn(params), J v).

    Args:
        fn: params -> a tensor of any shape.
        params, vector, mode: as in `hvp`.

    Raises:
        ValueError: as in `hvp`.

    Example:
        >>> jvp(lambda p: p["w"] ** 2, {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 1.0])})
        (tensor([1., 4.]), tensor([2., 4.]))
    """
    vector = _like(vector, params)

    def forward() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.func.jvp(fn, (_detached(params),), (vector,))  # type: ignore[assignment]
        return found

    def reverse() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaves = _leaves(params)
            output = fn(leaves)
            dummy = torch.zeros_like(output).requires_grad_()
            pulled = _gradient(output, leaves, dummy, create_graph=True)
            slope = sum((pulled[name] * v).sum() for name, v in vector.items())
            tangent = _gradient(slope, {"": dummy})[""] if isinstance(slope, Tensor) else torch.zeros_like(output)
        return output.detach(), tangent.detach()

    return _first_that_works(mode, forward, reverse)


def vjp(
    fn: Callable[[NamedTensors], Tensor], params: NamedTensors, cotangent: Tensor, *, mode: Mode = "auto"
) -> NamedTensors:
    """A vector times the Jacobian of `fn`, J^T u, by one backward pass.

    Args:
        fn: params -> a tensor of the shape of `cotangent`.
        cotangent: u.
        params, mode: as in `hvp`; "forward" and "auto" go through `torch.func` (and so may run under `torch.vmap`), "reverse"
            through plain autograd, which also takes custom functions that `torch.func` does not know.

    Example:
        >>> vjp(lambda p: p["w"] ** 2, {"w": torch.tensor([1.0, 2.0])}, torch.tensor([1.0, 1.0]))
        {'w': tensor([2., 4.])}
    """

    def forward() -> NamedTensors:
        pull = torch.func.vjp(fn, _detached(params))[1]
        return pull(cotangent)[0]

    def reverse() -> NamedTensors:
        with torch.enable_grad():
            leaves = _leaves(params)
            return _detached(_gradient(fn(leaves), leaves, cotangent))

    return _first_that_works(mode, forward, reverse)


def graph_nodes(outputs: Iterable[Tensor]) -> Iterator[torch.autograd.graph.Node]:
    """Every node of the autograd graph behind some tensors, each once.

    Example:
        >>> [type(node).__name__ for node in graph_nodes([torch.ones(1, requires_grad=True).exp()])]
        ['ExpBackward0', 'AccumulateGrad']
    """
    stack = [output.grad_fn for output in outputs]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        yield node
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)


def _like(vector: NamedTensors, params: NamedTensors) -> NamedTensors:
    """The vector in the order and dtypes of the parameters, or a ValueError that says what does not match."""
    same_names(params, vector)
    for name, p in params.items():
        if vector[name].shape != p.shape:
            raise ValueError(f"vector[{name!r}] must have the parameter's shape {tuple(p.shape)}, got {tuple(vector[name].shape)}")
    return {name: vector[name].detach().to(p.dtype) for name, p in params.items()}


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}; reduce the loss over the batch")
    return loss.reshape(())


def _detached(tensors: Mapping[str, Tensor]) -> NamedTensors:
    return {name: t.detach() for name, t in tensors.items()}


def _leaves(tensors: Mapping[str, Tensor]) -> NamedTensors:
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


def _gradient(output: Tensor, leaves: NamedTensors, cotangent: Tensor | None = None, create_graph: bool = False) -> NamedTensors:
    """Autograd's gradient by name, with zeros where the output does not depend on a leaf."""
    if not output.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        output, list(leaves.values()), cotangent, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def _first_that_works(mode: Mode, forward: Callable[[], _T], reverse: Callable[[], _T]) -> _T:
    if mode not in ("auto", "forward", "reverse"):
        raise ValueError(f'mode must be "auto", "forward" or "reverse", got {mode!r}')
    with _plain_kernels():
        if mode != "reverse":
            try:
                return forward()
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError):
                # Not implemented in forward mode or under torch.func; an error of the function's own comes back from reverse().
                if mode == "forward":
                    raise
        try:
            return reverse()
        except (NotImplementedError, RuntimeError) as error:
            error.add_note("gradwise: fused kernels may have no second derivative; switch them off for this module.")
            raise


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention without its fused kernels, which can be differentiated only once."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
