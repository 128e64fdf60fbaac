"""Claims of comp_sum: which member of the family learns best with clean and with noisy labels, and robustness beside TRADES.

The label-noise half and the clean half train the digits network for 100 epochs with Adam at torch's defaults, without weight
decay, and test on 40 per cent of the data. The robust half gives both methods nine settings each, chosen once by the
validation split's robust accuracy, and then trains from fresh seeds. That choice rests on one run a setting: with two threads,
whose sums round otherwise, other settings were chosen and both robust claims came out as reproduced (+0.034 and +0.027).
The claim on tau = 1.5 and the second attack were added after first results.
Training is seeded as a whole, so that two losses meet the same initial weights, batches and wrong labels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from gradwise.bench import tasks
from gradwise.bench.claim import Claim
from gradwise.core.protocols import Objective, supervised
from gradwise.losses import CompSumLoss, SmoothAdversarialCompSumLoss

RADIUS = 0.1
"""Of the l_inf ball around an image whose pixels lie in [0, 1]."""


class LargerTauWithstandsLabelNoise(Claim):
    paper = "comp_sum"
    statement = "With 40 per cent uniformly wrong labels, tau = 2 (mean absolute error) tests better than tau = 1 (cross-entropy)."
    published = "no figure in this paper; generalized cross-entropy, which it takes up, was published for noisy labels"
    metric, better = "test accuracy", "higher"
    seeds = range(6)
    needs = "digits: 10 s on 2 cores"

    def measure(self, seed: int) -> dict[str, float]:
        return {"method": _accuracy(2.0, 0.4, seed), "baseline": _accuracy(1.0, 0.4, seed)}


class GeneralizedCrossEntropyWithstandsLabelNoise(Claim):
    paper = "comp_sum"
    statement = "With 40 per cent uniformly wrong labels, tau = 1.5 (generalized cross-entropy, q = 1/2) tests better than tau = 1."
    published = "no figure in this paper; generalized cross-entropy, which it takes up, was published for noisy labels"
    metric, better = "test accuracy", "higher"
    seeds = range(6)
    needs = "digits: 10 s on 2 cores"

    def measure(self, seed: int) -> dict[str, float]:
        return {"method": _accuracy(1.5, 0.4, seed), "baseline": _accuracy(1.0, 0.4, seed)}


class CrossEntropyBeatsMeanAbsoluteErrorOnCleanLabels(Claim):
    paper = "comp_sum"
    statement = "With clean labels tau = 1 (cross-entropy) tests better than tau = 2 (mean absolute error)."
    published = "tau = 1 best or tied on CIFAR-10 and CIFAR-100, tau = 2 clearly worse"
    metric, better = "test accuracy", "higher"
    seeds = range(6)
    needs = "digits: 10 s on 2 cores"

    def measure(self, seed: int) -> dict[str, float]:
        return {"method": _accuracy(1.0, 0.0, seed), "baseline": _accuracy(2.0, 0.0, seed)}


class CrossEntropyBeatsSumExponentialOnCleanLabels(Claim):
    paper = "comp_sum"
    statement = "With clean labels tau = 1 (cross-entropy) tests better than tau = 0 (sum-exponential)."
    published = "tau = 1 best or tied on CIFAR-10 and CIFAR-100, tau = 0 clearly worse"
    metric, better = "test accuracy", "higher"
    seeds = range(6)
    needs = "digits: 10 s on 2 cores"

    def measure(self, seed: int) -> dict[str, float]:
        return {"method": _accuracy(1.0, 0.0, seed), "baseline": _accuracy(0.0, 0.0, seed)}


class MoreRobustThanTrades(Claim):
    paper = "comp_sum"
    statement = "Trained adversarially, the smooth adversarial comp-sum loss (tau = 1) is more robust than TRADES."
    published = "higher AutoAttack accuracy than TRADES on CIFAR-10, CIFAR-100 and SVHN; no single figure"
    metric, better = "test accuracy under the worse of two PGD-20 attacks (l_inf radius 0.1 of the pixels' range)", "higher"
    needs = "digits: 40 s on 2 cores, shared with the next claim"

    def measure(self, seed: int) -> dict[str, float]:
        return {"method": _robust_and_clean("smooth", seed)[0], "baseline": _robust_and_clean("trades", seed)[0]}


class CleanerThanTrades(Claim):
    paper = "comp_sum"
    statement = "Trained adversarially, the smooth adversarial comp-sum loss (tau = 1) has a higher clean accuracy than TRADES."
    published = "higher clean accuracy than TRADES on CIFAR-10, CIFAR-100 and SVHN"
    metric, better = "test accuracy", "higher"
    needs = "digits: the networks of the claim before"

    def measure(self, seed: int) -> dict[str, float]:
        return {"method": _robust_and_clean("smooth", seed)[1], "baseline": _robust_and_clean("trades", seed)[1]}


def _trained(task: tasks.Task, objective: Objective, seed: int, epochs: int, lr: float = 1e-3) -> nn.Module:
    model = task.model(torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * (len(task.train[0]) // task.batch_size)
    for batch in itertools.islice(task.batches(seed), steps):
        optimizer.zero_grad()
        objective(model, batch).backward()
        optimizer.step()
    return model.eval()


@functools.cache
def _accuracy(tau: float, noise: float, seed: int) -> float:
    """Test accuracy on the held-out 40 per cent after training with this share of labels drawn anew, uniformly."""
    task = tasks.load("digits")
    inputs, target = task.train
    generator = torch.Generator().manual_seed(seed)
    redrawn = torch.rand(len(target), generator=generator) < noise
    noisy = torch.randint(10, target.shape, generator=generator).where(redrawn, target)
    model = _trained(dataclasses.replace(task, train=(inputs, noisy)), supervised(CompSumLoss(tau)), seed, epochs=100)
    held_out = tuple(torch.cat(parts) for parts in zip(task.validation, task.test, strict=True))
    with torch.no_grad():
        return task.evaluate(model, held_out)


# ---- the robust half ----

SETTINGS: dict[str, list[tuple[float, ...]]] = {
    "smooth": [(rho, nu) for rho in (0.5, 1.0, 2.0) for nu in (0.25, 0.5, 1.0)],
    "trades": [(beta,) for beta in (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)],
}
"""Nine settings for each. The method's never changed; TRADES' once ended at 12, which was picked, and were widened. Default: 6."""


@functools.cache
def _robust_and_clean(method: str, seed: int) -> tuple[float, float]:
    """Test accuracy under attack and without, of the setting that was best on the validation split at a seed of its own."""
    task = dataclasses.replace(tasks.load("digits"), batch_size=256)
    return _evaluated(_adversarially_trained(task, method, _chosen(method), seed), task.test)


@functools.cache
def _chosen(method: str) -> tuple[float, ...]:
    task = dataclasses.replace(tasks.load("digits"), batch_size=256)
    return max(SETTINGS[method], key=lambda s: _evaluated(_adversarially_trained(task, method, s, seed=1000), task.validation))


def _adversarially_trained(task: tasks.Task, method: str, setting: tuple[float, ...], seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    if method == "smooth":
        rho, nu = setting
        objective: Objective = SmoothAdversarialCompSumLoss(rho=rho, nu=nu, gamma=RADIUS, clamp=(0.0, 1.0), generator=generator)
    else:
        objective = functools.partial(_trades, beta=setting[0], generator=generator)
    return _trained(task, objective, seed, epochs=40, lr=3e-3)


def _trades(model: nn.Module, batch: tuple[Tensor, Tensor], *, beta: float, generator: torch.Generator) -> Tensor:
    """CE(h(x), y) + beta max_{x'} KL(p(x) || p(x')) (Zhang et al. 2019); ten steps of a quarter radius, start 0.001 N(0, 1)."""
    x, y = batch
    start = x + 0.001 * torch.randn(x.shape, generator=generator)
    clean = log_softmax(model(x), 1)

    def divergence(z: Tensor, reference: Tensor) -> Tensor:
        return kl_div(log_softmax(model(z), 1), reference, log_target=True, reduction="batchmean")

    moved = _ascended(lambda z: divergence(z, clean.detach()), x, start, steps=10, step_size=RADIUS / 4)
    return nn.functional.nll_loss(clean, y) + beta * divergence(moved, clean)


def _evaluated(model: nn.Module, data: tasks.Data) -> tuple[float, float]:
    """Accuracy under attack, and without.

    An image counts as right when it withstands both of two PGD attacks of 20 steps, on the cross-entropy and on the margin:
    large scores weaken the first, and the two objectives train to different scales of scores.
    """
    x, y = data
    start = x + RADIUS * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1)

    def margin(z: Tensor) -> Tensor:
        scores = model(z)
        others = scores.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
        return (others - scores.gather(1, y.unsqueeze(1)).squeeze(1)).sum()

    withstood = torch.ones_like(y, dtype=torch.bool)
    for goal in (lambda z: cross_entropy(model(z), y, reduction="sum"), margin):
        withstood &= model(_ascended(goal, x, start, steps=20, step_size=RADIUS / 8)).argmax(1) == y
    with torch.no_grad():
        return float(withstood.float().mean()), tasks.accuracy(model, data)


def _ascended(objective: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, steps: int, step_size: float) -> Tensor:
    """Projected sign-gradient ascent in the l_inf ball around x and in [0, 1]."""
    low, high = (x - RADIUS).clamp(min=0.0), (x + RADIUS).clamp(max=1.0)
    z = start.clamp(low, high)
    for _ in range(steps):
        z.requires_grad_()
        (grad,) = torch.autograd.grad(objective(z), z)
        z = (z.detach() + step_size * grad.sign()).clamp(low, high)
    return z.detach()
