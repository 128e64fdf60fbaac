"""AdaBelief: Adam whose second moment is the error of its own prediction (Zhuang et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from gradwise.core.hyperparameters import betas_in_range, non_negative
from gradwise.core.papers import paper
from gradwise.core.rule_arithmetic import moving_average_, moving_square_, scale_and_shift, step_along_ratio_
from gradwise.core.rule_optimizer import EngineOptions, Params, RuleOptimizer
from gradwise.core.search_space import LogUniform


@paper("adabelief", arxiv="2010.07468", title="AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients")
class AdaBelief(RuleOptimizer):
    """AdaBelief. Large steps where the gradient is what its running mean predicted, small ones where it surprises:

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        s_t = beta2 s_{t-1} + (1 - beta2) (g_t - m_t)^2 + eps                     (eps stays in the state)
        w_t = w_{t-1} - lr / (1 - beta1^t) m_t / (sqrt(s_t) / sqrt(1 - beta2^t) + eps)

    With `rectify` (RAdam's variance rectification R_t) the last line is w - lr R_t m_t / (sqrt(s_t) + eps) from the sixth step on (at
    beta2 = 0.999); before, SGD with momentum or no update.

    Args:
        params: parameters, named parameters or groups.
        lr: step size.
        betas: decay of the prediction and of its squared error.
        eps: 1e-16 with `rectify` for Transformers and GANs, 1e-8 where SGD does better than Adam, says the authors' repository.
        weight_decay: decoupled from the gradient, or added to it (`weight_decouple=False`).
        amsgrad: divide by the largest s_t so far; without effect on rectified steps, as in the authors' code.
        weight_decouple: see weight_decay.
        fixed_decay: decoupled decay by weight_decay itself instead of lr * weight_decay.
        rectify: see above; False is the paper's own setting.
        degenerated_to_sgd: what the steps before rectification do: SGD with momentum (True) or nothing (False).
        **engine: mode, state, flat, min_8bit_size, maximize; see `EngineOptions`.

    Raises:
        ValueError: lr, eps or weight_decay < 0, a beta outside [0, 1).
        RuntimeError: a sparse gradient.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> w.grad = torch.ones(1)
        >>> AdaBelief([w], lr=0.1, rectify=False).step()
        >>> w.data  # the first surprise is beta1 g, so the first step is lr / beta1
        tensor([-0.1111])

    Source: Zhuang et al. 2020, algorithm 2; options of the authors' adabelief-pytorch 0.2.0. Differences: every option may differ by
    group; R_t is computed afresh instead of read from a cached table; a coordinate with s = 0 (eps = 0, no gradient yet) rests instead of
    becoming NaN.
    """

    search_space = {"lr": LogUniform(1e-4, 1e-1), "weight_decay": LogUniform(1e-5, 1e-1)}

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-16,
        weight_decay: float = 0.0, amsgrad: bool = False, weight_decouple: bool = True, fixed_decay: bool = False, rectify: bool = True,
        degenerated_to_sgd: bool = True, **engine: Unpack[EngineOptions],
    ) -> None:  # fmt: skip
        non_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        betas_in_range(betas)
        options = {"amsgrad": amsgrad, "weight_decouple": weight_decouple, "fixed_decay": fixed_decay, "rectify": rectify}
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, **options, "degenerated_to_sgd": degenerated_to_sgd}, **engine)

    @classmethod
    def states_of(cls, group: Mapping[str, Any]) -> dict[str, bool]:
        return {"exp_avg": True, "exp_avg_var": False} | ({"max_exp_avg_var": False} if group["amsgrad"] else {})

    @staticmethod
    def scalars(group: Mapping[str, Any], step: int) -> dict[str, float | bool]:
        (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
        size, scale, floor = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), float(group["eps"])
        if group["rectify"]:
            rectification = _rectification(beta2, step)
            if rectification:
                size, scale = size * rectification, 1.0
            else:  # a denominator of 1: SGD with momentum, or no step at all
                size, scale, floor = size if group["degenerated_to_sgd"] else 0.0, 0.0, 1.0
        return {
            "size": size, "scale": scale, "floor": floor, "beta1": beta1, "beta2": beta2, "eps": group["eps"], "decay": decay,
            "keep": 1 - (decay if group["fixed_decay"] else lr * decay), "decoupled": bool(decay and group["weight_decouple"]),
            "coupled": bool(decay and not group["weight_decouple"]), "amsgrad": bool(group["amsgrad"]),
            "use_maximum": bool(group["amsgrad"] and not group["rectify"]), "may_vanish": group["eps"] == 0,
        }  # fmt: skip

    @staticmethod
    def rule(param: Tensor, grad: Tensor, state: dict[str, Tensor], h: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if h.decoupled:
            param.mul_(h.keep)
        if h.coupled:
            grad = grad + h.decay * param
        mean = moving_average_(state["exp_avg"], grad, h.beta1)
        variance = moving_square_(state["exp_avg_var"], grad - mean, h.beta2).add_(h.eps)
        after = {"exp_avg": mean, "exp_avg_var": variance}
        if h.amsgrad:
            after["max_exp_avg_var"] = torch.maximum(state["max_exp_avg_var"], variance)
        spread = after["max_exp_avg_var"] if h.use_maximum else variance
        denominator = scale_and_shift(spread.sqrt(), h.scale, h.floor)
        if h.may_vanish:
            denominator.clamp_min_(torch.finfo(mean.dtype).tiny)  # 0 / 0 must rest, not become NaN
        return step_along_ratio_(param, mean, denominator, h.size), after


def _rectification(beta2: float, step: int) -> float:
    """RAdam's R_t, or 0 while the variance of 1 / sqrt(s_t) is not finite yet (rho_t < 5)."""
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * step * beta2**step / (1 - beta2**step)
    if rho < 5:
        return 0.0
    return math.sqrt((1 - beta2**step) * (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
