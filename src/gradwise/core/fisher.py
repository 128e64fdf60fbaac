"""The Fisher matrix as a product: the mean outer product of the gradients of log-likelihoods, empirical, sampled or true.

It is the Gauss-Newton matrix of the N losses taken as outputs, F = J^T J / N with J (N, P) their Jacobian, so it needs no
per-example gradient. Which Fisher it is depends on the labels alone: those of the data (empirical) or draws from the model
(true, by Monte Carlo).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gradwise.core.curvature import Mode, ModelFunction, ggn_product
from gradwise.core.examples import one_loss_an_example
from gradwise.core.protocols import Batch, NamedTensors


def fisher_product(
    losses_fn: ModelFunction, params: NamedTensors, batch: Batch, vector: NamedTensors, *, mode: Mode = "auto"
) -> NamedTensors:
    """The Fisher matrix of a batch times a vector, F v = (1/N) sum_i g_i <g_i, v>, with g_i the gradient of example i's loss.

    With the labels of the data this is the empirical Fisher. With labels drawn from the model itself (`sample_targets`) it is
    an unbiased estimate of the true Fisher; draw them once and keep them, so that all products belong to one matrix. The true
    Fisher without sampling is `ggn_product` (see there for when). No per-example gradient is ever formed: F v = J^T (J v) / N
    with J the Jacobian of the N losses.

    Args:
        losses_fn: (params, batch) -> (N,), the negative log-likelihood of each example, such as
            `loss_function(model, supervised(nn.CrossEntropyLoss(reduction="none")))`.
        params, batch, vector, mode: as in `hvp`.

    Raises:
        ValueError: the losses are not of shape (N,), or as in `hvp`.

    Example:
        >>> losses = lambda params, x: x * params["w"]
        >>> fisher_product(losses, {"w": torch.tensor(1.0)}, torch.tensor([1.0, 3.0]), {"w": torch.tensor(2.0)})
        {'w': tensor(10.)}
    """

    def losses(p: NamedTensors, b: Batch) -> Tensor:
        return one_loss_an_example(losses_fn(p, b), None, "losses_fn")

    def half_mean_square(output: Tensor, _: Batch) -> Tensor:
        return 0.5 * output.square().sum() / max(len(output), 1)

    return ggn_product(losses, half_mean_square, params, batch, vector, mode=mode)


def sample_targets(
    output: Tensor,
    likelihood: Literal["categorical", "bernoulli", "gaussian"] = "categorical",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Targets drawn from the model's own predictive distribution, for the true Fisher.

    Args:
        output: "categorical": logits (..., C), gives class indices (...); "bernoulli": logits, gives zeros and ones of the
            same shape; "gaussian": means of unit-variance normals (the likelihood of half the squared error), gives values of
            the same shape.
        likelihood: which of the three.
        generator: on the device of `output`.

    Raises:
        ValueError: the likelihood is unknown.

    Example:
        >>> sample_targets(torch.tensor([[0.0, 100.0], [100.0, 0.0]]))
        tensor([1, 0])
    """
    output = output.detach()
    wide = output.to(torch.promote_types(output.dtype, torch.float32))
    if likelihood == "categorical":
        probabilities = wide.softmax(-1).reshape(-1, output.shape[-1])
        return torch.multinomial(probabilities, 1, generator=generator).view(output.shape[:-1])
    if likelihood == "bernoulli":
        return torch.bernoulli(wide.sigmoid(), generator=generator).to(output.dtype)
    if likelihood == "gaussian":
        return output + torch.randn(output.shape, dtype=wide.dtype, device=output.device, generator=generator).to(output.dtype)
    raise ValueError(f'likelihood must be "categorical", "bernoulli" or "gaussian", got {likelihood!r}')
