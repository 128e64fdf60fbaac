"""What the optimizer claims share: one training run and one honest choice of a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from gradwise.bench import tasks
from gradwise.bench.tasks import Data, Task

Build = Callable[[Iterable[nn.Parameter], float], Optimizer]
"""(parameters, learning rate) -> optimizer."""


@dataclass(frozen=True)
class Chosen:
    """The learning rate of a grid with the lowest validation loss, and what the run at that rate gives on the test split."""

    lr: float
    accuracy: float


def train(task: Task, build: Build, lr: float, seed: int, steps: int) -> nn.Module:
    """The task's model after `steps` steps; initialisation and batch order depend on the seed alone, whatever the optimizer."""
    model = task.model(torch.Generator().manual_seed(seed))
    optimizer, batches = build(model.parameters(), lr), task.batches(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        task.objective(model, next(batches)).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(task: Task, model: nn.Module, split: Data) -> float:
    """The task's accuracy; a diverged model knows nothing."""
    value = task.evaluate(model, split)
    return value if math.isfinite(value) else 0.0


def tune(build: Build, rates: Sequence[float], seed: int, steps: int, batch_size: int = 64) -> Chosen:
    """Train the digits task once per learning rate and keep the rate with the lowest validation loss; the test split has no say."""
    task = replace(tasks.load("digits"), batch_size=batch_size)
    best, chosen = math.inf, None
    for lr in rates:
        model = train(task, build, lr, seed, steps)
        with torch.no_grad():
            loss = float(cross_entropy(model(task.validation[0]), task.validation[1]))
        if loss < best:  # never true of a diverged run, whose loss is nan
            best, chosen = loss, Chosen(lr, accuracy(task, model, task.test))
    if chosen is None:
        raise ValueError(f"training diverged at every learning rate of {list(rates)}")
    return chosen
