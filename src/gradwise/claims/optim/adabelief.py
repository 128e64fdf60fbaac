"""Claims of adabelief: longer steps where the gradient is predictable, and test accuracy like SGD's and above Adam's."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from gradwise.bench.claim import Claim
from gradwise.claims.optim._training import Build, Chosen, tune
from gradwise.optim import AdaBelief


class LongerStepsWhereTheGradientIsPredictable(Claim):
    """Both coordinates have E[g^2] = 1, so that Adam's denominator cannot tell them apart."""

    paper = "adabelief"
    statement = "Against Adam, AdaBelief takes longer steps along a constant gradient than along noise of the same second moment."
    published = "no single figure (the paper argues it in section 2.2)"
    metric, better = "AdaBelief's step length over Adam's after 200 steps", "higher"
    seeds = range(5)
    needs = "101 numbers: 1 s"

    def measure(self, seed: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(200, 100, generator=generator)
        belief = _last_steps(lambda params, lr: AdaBelief(params, lr=lr, eps=1e-16, rectify=False, mode="foreach"), noise)
        adam = _last_steps(lambda params, lr: torch.optim.Adam(params, lr=lr, eps=1e-16), noise)
        return {"method": belief[0] / adam[0], "baseline": belief[1] / adam[1]}


def _last_steps(build: Build, noise: Tensor) -> tuple[float, float]:
    """Mean length of the last step along the gradient 1 and along the rows of `noise`."""
    constant, noisy = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(noise.shape[1]))
    optimizer = build([constant, noisy], 1e-3)
    for gradient in noise:
        before = constant.detach().clone(), noisy.detach().clone()
        constant.grad, noisy.grad = torch.ones(1), gradient.clone()
        optimizer.step()
    return float((constant.detach() - before[0]).abs().mean()), float((noisy.detach() - before[1]).abs().mean())


class _Digits(Claim, abstract=True):
    """Each optimizer at the learning rate, of five half a decade apart, that gives it the lowest validation loss."""

    paper = "adabelief"
    metric, better = "test accuracy on digits", "higher"
    seeds = range(10)
    needs = "digits, MLP 64-64-10, 300 steps, 5 learning rates an optimizer: 30 s on 2 cores for both claims"
    expects, tolerance = "not worse", 0.01
    baseline = ""

    def measure(self, seed: int) -> dict[str, float]:
        return {"method": _tuned("adabelief", seed).accuracy, "baseline": _tuned(self.baseline, seed).accuracy}


class GeneralisesLikeSGD(_Digits):
    paper = "adabelief"
    statement = "AdaBelief's test accuracy is as good as that of SGD with momentum (tolerance: 1 point)."
    published = "ImageNet, ResNet-18: about 70.08 % top-1 against 70.23 % of SGD"
    baseline = "sgd"


class GeneralisesBetterThanAdam(_Digits):
    paper = "adabelief"
    statement = "AdaBelief's test accuracy is higher than Adam's."
    published = "higher than Adam's in all of the paper's image tasks; no single figure"
    expects, tolerance = "difference", 0.0
    baseline = "adam"


_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_OPTIMIZERS: dict[str, tuple[Build, tuple[float, ...]]] = {
    # the paper's own setting of the options; the package's later defaults differ
    "adabelief": (lambda params, lr: AdaBelief(params, lr=lr, eps=1e-8, rectify=False, mode="foreach"), _RATES),
    "adam": (lambda params, lr: torch.optim.Adam(params, lr=lr), _RATES),
    "sgd": (lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9), (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
}


@cache
def _tuned(name: str, seed: int) -> Chosen:
    build, rates = _OPTIMIZERS[name]
    return tune(build, rates, seed, steps=300)
