"""Lion: the sign of an interpolation between momentum and gradient, found by a program search (Chen et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

from gradwise.core.hyperparameters import betas_in_range, non_negative
from gradwise.core.papers import paper
from gradwise.core.rule_arithmetic import interpolate, moving_average_, step_along_
from gradwise.core.rule_optimizer import EngineOptions, Params, RuleOptimizer
from gradwise.core.search_space import LogUniform


@paper("lion", arxiv="2302.06675", title="Symbolic Discovery of Optimization Algorithms")
class Lion(RuleOptimizer):
    """Lion. One momentum buffer, every coordinate moves by exactly lr (or rests where the sign is 0):

        c_t = beta1 m_{t-1} + (1 - beta1) g_t
        w_t = (1 - lr wd) w_{t-1} - lr sign(c_t)
        m_t = beta2 m_{t-1} + (1 - beta2) g_t

    Args:
        params: parameters, named parameters or groups.
        lr: step length of every coordinate; 3 to 10 times smaller than AdamW's.
        betas: (of the update, of the state); the paper uses (0.95, 0.98) for language models.
        weight_decay: decoupled; 3 to 10 times larger than AdamW's, so that lr * weight_decay stays about equal.
        **engine: mode, state, flat, min_8bit_size, maximize; see `EngineOptions`.

    Raises:
        ValueError: lr < 0, a beta outside [0, 1), weight_decay < 0.
        RuntimeError: a sparse gradient.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> w.grad = torch.tensor([0.5, -20.0, 0.0])
        >>> Lion([w], lr=0.1).step()
        >>> w.data
        tensor([-0.1000,  0.1000,  0.0000])

    Source: Chen et al. 2023, program 1.
    """

    states = {"exp_avg": True}
    search_space = {"lr": LogUniform(1e-5, 1e-2), "weight_decay": LogUniform(1e-4, 1.0)}

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0,
        **engine: Unpack[EngineOptions],
    ) -> None:  # fmt: skip
        non_negative(lr=lr, weight_decay=weight_decay)
        betas_in_range(betas)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **engine)

    @staticmethod
    def scalars(group: Mapping[str, Any], step: int) -> dict[str, float | bool]:
        (beta1, beta2), decay = group["betas"], float(group["lr"]) * group["weight_decay"]
        return {"lr": group["lr"], "keep": 1 - decay, "decays": bool(group["weight_decay"]), "beta1": beta1, "beta2": beta2}

    @staticmethod
    def rule(param: Tensor, grad: Tensor, state: dict[str, Tensor], h: Any) -> tuple[Tensor, dict[str, Tensor]]:
        direction = interpolate(state["exp_avg"], grad, h.beta1).sign_()
        momentum = moving_average_(state["exp_avg"], grad, h.beta2)
        if h.decays:
            param.mul_(h.keep)
        return step_along_(param, direction, h.lr), {"exp_avg": momentum}
