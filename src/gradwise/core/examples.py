"""Batches as rows of examples: how many there are, a few of them as a batch of their own, and one loss for each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradwise.core.protocols import Batch


def number_of_examples(batch: Batch) -> int:
    """The size of the first dimension, which all tensors of a batch (a tensor, or any nest of tuples, lists and dicts) must share.

    Raises:
        ValueError: the batch has no tensor with a first dimension, or its tensors disagree (their shapes are named).

    Example:
        >>> number_of_examples((torch.zeros(4, 3), torch.zeros(4)))
        4
    """
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not shapes or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"a batch needs tensors that share their first dimension, the example; got shapes {shapes}")
    return int(shapes[0][0])


def take_examples(batch: Batch, rows: slice | Tensor) -> Batch:
    """The batch of the examples in `rows` (a slice or a tensor of indices); what is not a tensor stays as it is.

    Example:
        >>> take_examples((torch.arange(4), "name"), slice(1, 3))
        (tensor([1, 2]), 'name')
    """
    return pytree.tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, batch)


def example_axes(batch: Batch) -> Batch:
    """The `in_dims` that make `torch.vmap` run over examples: 0 for every tensor of the batch, None for the rest.

    Example:
        >>> example_axes((torch.zeros(4, 3), "name"))
        (0, None)
    """
    return pytree.tree_map(lambda leaf: 0 if isinstance(leaf, torch.Tensor) else None, batch)


def one_loss_an_example(losses: Tensor, count: int | None, name: str) -> Tensor:
    """Check that a per-example loss is one, of shape (N,).

    Args:
        losses: what the loss returned.
        count: N, if known.
        name: of the argument that returned it, for the message.

    Raises:
        ValueError: it is not, most often because the loss averages over the batch.

    Example:
        >>> one_loss_an_example(torch.tensor(1.0), 4, "objective")
        Traceback (most recent call last):
        ValueError: objective must return one loss an example, shape (4,), got (); use a loss with reduction="none" (and sum
            each example's positions)
    """
    if losses.ndim != 1 or (count is not None and len(losses) != count):
        raise ValueError(
            f"{name} must return one loss an example, shape ({'N' if count is None else count},), got {tuple(losses.shape)}; "
            'use a loss with reduction="none" (and sum each example\'s positions)'
        )
    return losses
