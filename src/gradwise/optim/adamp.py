"""AdamP and SGDP: keep momentum from inflating weights whose scale does not matter (Heo et al. 2020).

A weight followed by a normalisation has no say in the loss by its norm, so its gradient is orthogonal to it; momentum is not, and only lets
the norm grow and the effective step lr / ||w||^2 shrink. Both optimizers remove the radial part of the update where the gradient shows that
the weight is of this kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from gradwise.core.hyperparameters import betas_in_range, fraction, non_negative
from gradwise.core.papers import paper
from gradwise.core.rule_arithmetic import interpolate, moving_average_, moving_square_, step_along_, step_along_ratio_
from gradwise.core.rule_optimizer import EngineOptions, Params, RuleOptimizer
from gradwise.core.search_space import Choice, LogUniform


@paper("adamp", arxiv="2006.08217", title="AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights")
def radial_projection(weight: Tensor, grad: Tensor, update: Tensor, delta: float = 0.1, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Remove from an update the part along the weight, where the gradient is orthogonal to the weight.

    Two views are tried in this order: one vector a row (output channel), then the whole matrix as one vector. A view of vectors of length n
    passes when max_k |cos(g_k, w_k)| < delta / sqrt(n); then u_k <- u_k - w_k <w_k, u_k> / (||w_k|| + eps)^2 for every k. If no view passes
    the update is returned as it is. Free of branches: it compiles and vmaps.

    Args:
        weight, grad, update: (rows, columns); more dimensions are flattened behind the first.
        delta: tolerance of the test; 0 never projects.
        eps: lower bound of the norms.

    Returns:
        (update of the same shape, 0-d bool tensor: whether a view passed).

    Raises:
        ValueError: a weight with fewer than two dimensions.

    Example:
        >>> w, g = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> radial_projection(w, g, torch.tensor([[3.0, 4.0]]))
        (tensor([[0., 4.]]), tensor(True))

    Source: Heo et al. 2020, equations 11 and 12; the authors' `_projection`.
    """
    if weight.ndim < 2:
        raise ValueError(f"radial_projection needs a weight of two or more dimensions, got shape {tuple(weight.shape)}")
    shape, (w, g, u) = update.shape, (x.flatten(1) for x in (weight, grad, update))
    g_norms, w_norms = torch.linalg.vector_norm(g, dim=1), torch.linalg.vector_norm(w, dim=1)
    g_norm, w_norm = torch.linalg.vector_norm(g_norms), torch.linalg.vector_norm(w_norms)
    dots, u_dots = (g * w).sum(1), (w * u).sum(1)

    # one division at a time: products and squares of small norms would underflow; and with eps = 0 a dead channel must not be 0 / 0
    tiny = torch.finfo(w.dtype).tiny

    def cosine(dot: Tensor, g_norm: Tensor, w_norm: Tensor) -> Tensor:
        return dot.abs() / g_norm.clamp_min(eps).clamp_min(tiny) / w_norm.clamp_min(eps).clamp_min(tiny)

    def radial(dot: Tensor, w_norm: Tensor) -> Tensor:
        return torch.where(w_norm > 0, dot / (w_norm + eps) / (w_norm + eps), 0.0)

    rows_pass = cosine(dots, g_norms, w_norms).amax() < delta / math.sqrt(w.shape[1])
    matrix_passes = cosine(dots.sum(), g_norm, w_norm) < delta / math.sqrt(w.shape[0] * w.shape[1])
    factor = torch.where(rows_pass, radial(u_dots, w_norms), torch.where(matrix_passes, radial(u_dots.sum(), w_norm), 0.0))
    return torch.addcmul(u, factor.unsqueeze(1), w, value=-1).view(shape), rows_pass | matrix_passes


def _projected_step(param: Tensor, grad: Tensor, update: Tensor, size: Any, h: Any) -> Tensor:
    """The end of both rules: project a matrix's update, decay, step. Vectors have no scale to be free of."""
    if not h.is_matrix:
        return step_along_(param.mul_(1 - h.decay) if h.decays else param, update, size)
    update, projected = radial_projection(param, grad, update, h.delta, h.eps)
    if h.decays:
        # in the parameter's own precision: `torch.where` of two numbers would be float32
        param.mul_(1 - h.decay * (1 + (h.wd_ratio - 1) * projected.to(param.dtype)))
    return step_along_(param, update, size)


@paper("adamp")
class AdamP(RuleOptimizer):
    """AdamW whose update is projected off weights of free scale:

        m, v as in Adam;  u = m / (sqrt(v) / sqrt(1 - beta2^t) + eps);  (u, projected) = radial_projection(w, g, u)
        w <- w (1 - lr wd r) - lr / (1 - beta1^t) u,    r = wd_ratio where projected, else 1

    Args:
        params: parameters, named parameters or groups; those with one dimension get plain AdamW.
        lr, betas, eps, weight_decay: as AdamW.
        delta: tolerance of the orthogonality test.
        wd_ratio: factor of the weight decay where the update was projected (a free scale needs little decay).
        nesterov: u from beta1 m + (1 - beta1) g.
        **engine: mode, state, flat, min_8bit_size, maximize; see `EngineOptions`.

    Raises:
        ValueError: a negative number or a beta outside [0, 1).
        RuntimeError: a sparse gradient.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = AdamP([w], lr=0.1)
        >>> (w / w.norm()).square()[0, 0].backward()  # a loss that does not see the norm
        >>> optimizer.step()
        >>> float(w.detach().norm()) > 5  # the step was tangential
        True

    Source: Heo et al. 2020, algorithm 2. Output channels are taken from dimension 0, as in the authors' code, also for embeddings.
    """

    states = {"exp_avg": True, "exp_avg_sq": False}
    reduces = True
    search_space = {"lr": LogUniform(1e-4, 1e-1), "weight_decay": LogUniform(1e-5, 1e-1)}

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, delta: float = 0.1, wd_ratio: float = 0.1, nesterov: bool = False, **engine: Unpack[EngineOptions],
    ) -> None:  # fmt: skip
        non_negative(lr=lr, eps=eps, weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio)
        betas_in_range(betas)
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta, "wd_ratio": wd_ratio}
        super().__init__(params, {**numbers, "nesterov": nesterov}, **engine)

    @staticmethod
    def scalars(group: Mapping[str, Any], step: int) -> dict[str, float | bool]:
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        return {
            "size": lr / (1 - beta1**step), "decay": lr * group["weight_decay"], "variance_root": math.sqrt(1 - beta2**step),
            "beta1": beta1, "beta2": beta2, "eps": group["eps"], "delta": group["delta"], "wd_ratio": group["wd_ratio"],
            "nesterov": bool(group["nesterov"]), "decays": bool(group["weight_decay"]), "may_vanish": group["eps"] == 0,
        }  # fmt: skip

    @staticmethod
    def rule(param: Tensor, grad: Tensor, state: dict[str, Tensor], h: Any) -> tuple[Tensor, dict[str, Tensor]]:
        mean = moving_average_(state["exp_avg"], grad, h.beta1)
        square = moving_square_(state["exp_avg_sq"], grad, h.beta2)
        denominator = square.sqrt().div_(h.variance_root).add_(h.eps)
        if h.may_vanish:
            denominator.clamp_min_(torch.finfo(mean.dtype).tiny)  # 0 / 0 must rest, not become NaN
        numerator = interpolate(mean, grad, h.beta1) if h.nesterov else mean
        if h.is_matrix:
            param = _projected_step(param, grad, numerator / denominator, h.size, h)
        else:  # the operations of torch's AdamW, for the same bits
            param = step_along_ratio_(param.mul_(1 - h.decay) if h.decays else param, numerator, denominator, h.size)
        return param, {"exp_avg": mean, "exp_avg_sq": square}


@paper("adamp")
class SGDP(RuleOptimizer):
    """SGD with momentum whose update is projected off weights of free scale:

        b <- mu b + (1 - dampening) g;  d = g + mu b with Nesterov, else b;  (d, projected) = radial_projection(w, g, d)
        w <- w (1 - lr wd r / (1 - mu)) - lr d,    r = wd_ratio where projected, else 1

    Args:
        params: parameters, named parameters or groups; those with one dimension get plain SGD.
        lr: step size.
        momentum: mu.
        dampening: unlike torch.optim.SGD's it also acts on the first step, as in the authors' code.
        weight_decay: decoupled, scaled by 1 / (1 - momentum) to what an L2 term would do in the long run.
        nesterov, eps, delta, wd_ratio: as `AdamP`.
        **engine: mode, state, flat, min_8bit_size, maximize; see `EngineOptions`.

    Raises:
        ValueError: a negative number, or a momentum outside [0, 1).
        RuntimeError: a sparse gradient.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> w.grad = torch.tensor([1.0, 2.0])
        >>> SGDP([w], lr=0.1, momentum=0.9).step()
        >>> w.data
        tensor([0.9000, 0.8000])

    Source: Heo et al. 2020, algorithm 1. Difference: without Nesterov the authors' code projects the momentum buffer itself, because the
    update is the buffer and is projected in place; here, as in the algorithm, only the update is projected.
    """

    states = {"momentum": True}
    reduces = True
    search_space = {"lr": LogUniform(1e-3, 1.0), "momentum": Choice((0.0, 0.9, 0.95, 0.99)), "weight_decay": LogUniform(1e-6, 1e-2)}

    def __init__(
        self, params: Params, lr: float | Tensor, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False, eps: float = 1e-8, delta: float = 0.1, wd_ratio: float = 0.1, **engine: Unpack[EngineOptions],
    ) -> None:  # fmt: skip
        non_negative(lr=lr, dampening=dampening, weight_decay=weight_decay, eps=eps, delta=delta, wd_ratio=wd_ratio)
        fraction(momentum=momentum)
        numbers = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, {**numbers, "delta": delta, "wd_ratio": wd_ratio, "nesterov": nesterov}, **engine)

    @staticmethod
    def scalars(group: Mapping[str, Any], step: int) -> dict[str, float | bool]:
        lr, momentum = float(group["lr"]), group["momentum"]
        return {
            "lr": lr, "momentum": momentum, "take": 1 - group["dampening"], "decay": lr * group["weight_decay"] / (1 - momentum),
            "eps": group["eps"], "delta": group["delta"], "wd_ratio": group["wd_ratio"], "nesterov": bool(group["nesterov"]),
            "decays": bool(group["weight_decay"]), "takes_all": group["dampening"] == 0,
        }  # fmt: skip

    @staticmethod
    def rule(param: Tensor, grad: Tensor, state: dict[str, Tensor], h: Any) -> tuple[Tensor, dict[str, Tensor]]:
        momentum = state["momentum"].mul_(h.momentum).add_(grad if h.takes_all else h.take * grad)
        update = grad + h.momentum * momentum if h.nesterov else momentum
        return _projected_step(param, grad, update, h.lr, h), {"momentum": momentum}
