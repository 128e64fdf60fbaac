"""Claims of adamp: weights whose scale does not matter stop growing, and accuracy rises with it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import nn

from gradwise.bench import tasks
from gradwise.bench.claim import Claim
from gradwise.claims.optim._training import Build, accuracy, train
from gradwise.optim import SGDP, AdamP


def _normalised_mlp() -> nn.Sequential:
    hidden = [layer for inputs in (64, 64) for layer in (nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


class _Normalised(Claim, abstract=True):
    """Both optimizers at the same constant learning rate, fixed beforehand; 20 epochs, no weight decay."""

    paper = "adamp"
    seeds = range(10)
    needs = "digits, MLP 64-64-64-10 with BatchNorm, 20 epochs: 25 s on 2 cores for all four claims"
    pair: tuple[str, str]
    figure: str

    def measure(self, seed: int) -> dict[str, float]:
        method, baseline = self.pair
        return {"method": _trained(method, seed)[self.figure], "baseline": _trained(baseline, seed)[self.figure]}


class SGDPKeepsNormsSmall(_Normalised):
    paper = "adamp"
    statement = "With SGDP the weights before a normalisation grow less than with SGD with momentum."
    published = "no single figure (the paper plots norms over training)"
    metric, better = "Euclidean norm of the normalised weights after training over before", "lower"
    pair, figure = ("sgdp", "sgd"), "growth"


class AdamPKeepsNormsSmall(_Normalised):
    paper = "adamp"
    statement = "With AdamP the weights before a normalisation grow less than with Adam."
    published = "no single figure (the paper plots norms over training)"
    metric, better = "Euclidean norm of the normalised weights after training over before", "lower"
    pair, figure = ("adamp", "adam"), "growth"


class SGDPRaisesAccuracy(_Normalised):
    paper = "adamp"
    statement = "SGDP's test accuracy is higher than that of SGD with momentum."
    published = "gains in all of 13 benchmarks; no single figure"
    metric, better = "test accuracy on digits at the same constant learning rate", "higher"
    pair, figure = ("sgdp", "sgd"), "accuracy"


class AdamPRaisesAccuracy(_Normalised):
    paper = "adamp"
    statement = "AdamP's test accuracy is higher than Adam's."
    published = "gains in all of 13 benchmarks; ImageNet, ResNet-18: about 1 point over AdamW"
    metric, better = "test accuracy on digits at the same constant learning rate", "higher"
    pair, figure = ("adamp", "adam"), "accuracy"


_OPTIMIZERS: dict[str, tuple[Build, float]] = {
    "sgd": (lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9), 0.1),
    "sgdp": (lambda params, lr: SGDP(params, lr=lr, momentum=0.9, mode="foreach"), 0.1),
    "adam": (lambda params, lr: torch.optim.Adam(params, lr=lr), 0.01),
    "adamp": (lambda params, lr: AdamP(params, lr=lr, mode="foreach"), 0.01),
}


def _norm(model: nn.Module) -> float:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)][:-1]
    return float(torch.cat([layer.weight.detach().flatten() for layer in layers]).norm())


@cache
def _trained(name: str, seed: int) -> dict[str, float]:
    task = replace(tasks.load("digits"), model=tasks.seeded(_normalised_mlp))
    build, lr = _OPTIMIZERS[name]
    model = train(task, build, lr, seed, steps=20 * (len(task.train[0]) // task.batch_size))
    start = _norm(task.model(torch.Generator().manual_seed(seed)))
    return {"growth": _norm(model) / start, "accuracy": accuracy(task, model, task.test)}
