"""Tasks: a model, real data in three splits, an objective and a metric. What `compare` trains and claims measure on.

All data is on this machine already (scikit-learn's bundled sets, the standard library's own sources), so a comparison needs no
network. The split is fixed by a seed of its own, inputs are scaled with the training split's statistics alone, and `data_hash`
says in 64 characters whether two people measured on the same numbers.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from gradwise.core.errors import unknown
from gradwise.core.protocols import Objective, supervised

Data = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """Something to train, and how to tell who trained it best.

    Attributes:
        name: short name, as on the command line.
        metric: what `evaluate` returns, such as "accuracy", with its unit where it has one.
        better: "higher" or "lower", the good direction of the metric.
        model: builds the model with initial weights drawn from a generator and from nothing else (`seeded` makes one from a
            plain builder).
        objective: the scalar to descend, of (model, batch).
        train, validation, test: tensors whose first dimension is the example, the same number of tensors in each; a batch is the
            same tuple with fewer examples.
        evaluate: the metric of a model (in evaluation mode, under `torch.no_grad`) on one of the splits.
        batch_size: examples in a batch, at most the size of `train`.
        description: one sentence for the report.

    Example:
        >>> task = load("digits")
        >>> task.metric, task.better, len(task.train[0])
        ('accuracy', 'higher', 1079)
    """

    name: str
    metric: str
    better: Literal["higher", "lower"]
    model: Callable[[torch.Generator], nn.Module]
    objective: Objective
    train: Data
    validation: Data
    test: Data
    evaluate: Callable[[nn.Module, Data], float]
    batch_size: int = 64
    description: str = ""

    def batches(self, seed: int) -> Iterator[Data]:
        """Batches of the training split without end: each epoch a new shuffle, the same for everybody at the same seed.

        Every batch has the same size; the examples left over at the end of an epoch take their chance in the next one.

        Example:
            >>> inputs, target = next(load("digits").batches(seed=0))
            >>> inputs.shape, target.shape
            (torch.Size([64, 64]), torch.Size([64]))
        """
        count = len(self.train[0])
        size = min(self.batch_size, count)
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(count, generator=generator)
            for start in range(0, count - size + 1, size):
                chosen = order[start : start + size]
                yield tuple(x[chosen] for x in self.train)

    def data_hash(self) -> str:
        """SHA-256 of every number of the three splits, with shapes and dtypes, as 64 hexadecimal digits.

        Example:
            >>> len(load("digits").data_hash())
            64
        """
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for x in split:
                digest.update(f"{x.dtype} {tuple(x.shape)};".encode())
                digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def supports_loss(self) -> bool:
        """Whether another classification loss can stand in: the objective is `supervised(loss)` on class logits.

        Example:
            >>> load("digits").supports_loss, load("diabetes").supports_loss
            (True, False)
        """
        return hasattr(self.objective, "loss") and len(self.train) == 2 and not self.train[1].is_floating_point()


def names() -> list[str]:
    """The built-in tasks.

    Example:
        >>> names()
        ['breast_cancer', 'diabetes', 'digits', 'digits_cnn', 'stdlib_text', 'wine']
    """
    return sorted(_BUILDERS)


def load(name: str) -> Task:
    """A built-in task by its name, or a user's own by "file.py:function" (see `gradwise.bench.user_task`).

    Raises:
        UserError: no such task (with the nearest names), or a user's task that is not what it should be.

    Example:
        >>> load("wine").train[0].shape
        torch.Size([108, 13])
    """
    if ".py" in name:
        from gradwise.bench import user_task

        return user_task.load(name)
    if name not in _BUILDERS:
        raise unknown("task", name, [*names(), "my_task.py:task"])
    return _built(name)


@functools.cache
def _built(name: str) -> Task:
    return _BUILDERS[name]()


def seeded(build: Callable[[], nn.Module]) -> Callable[[torch.Generator], nn.Module]:
    """A model builder whose initial weights depend on a generator alone; torch's global random state is left as it was.

    Args:
        build: builds the model with torch's own initialisers, which draw from the global generator.

    Example:
        >>> model = seeded(lambda: nn.Linear(2, 1))
        >>> a, b = model(torch.Generator().manual_seed(0)), model(torch.Generator().manual_seed(0))
        >>> torch.equal(a.weight, b.weight)
        True
    """

    def with_generator(generator: torch.Generator) -> nn.Module:
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build()

    return with_generator


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of examples (or of positions) whose largest logit is the target's; NaN when a logit is not finite.

    Args:
        model: maps inputs to logits, (N, C) or (N, C, d1, ...).
        data: (inputs, target) with targets (N,) or (N, d1, ...).

    Example:
        >>> accuracy(nn.Identity(), (torch.eye(2), torch.tensor([0, 0])))
        0.5
    """
    inputs, target = data
    logits = model(inputs)
    return float((logits.argmax(1) == target).double().mean()) if bool(logits.isfinite().all()) else float("nan")


def split(*tensors: Tensor, seed: int = 0, validation: float = 0.2, test: float = 0.2) -> tuple[Data, Data, Data]:
    """Cut tensors into train, validation and test with one shuffle, the same for everybody.

    Args:
        tensors: with the same first dimension.
        seed: of the shuffle; it belongs to the task and not to a run.
        validation, test: shares of the examples.

    Example:
        >>> train, validation, test = split(torch.arange(10))
        >>> len(train[0]), len(validation[0]), len(test[0])
        (6, 2, 2)
    """
    count = len(tensors[0])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = int(count * validation), int(count * test)
    parts = order.split([count - sum(held), *held])
    return tuple(tuple(x[part] for x in tensors) for part in parts)  # type: ignore[return-value]


def mlp(*sizes: int) -> nn.Sequential:
    """Fully connected layers of these widths with ReLU between them; one layer alone is a linear model.

    Example:
        >>> mlp(64, 64, 10)[0]
        Linear(in_features=64, out_features=64, bias=True)
    """
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.ReLU()] if i else []
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)


def _small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def _bundled(name: str) -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    bunch: Any = getattr(datasets, f"load_{name}")()
    target = torch.from_numpy(bunch.target)
    return torch.from_numpy(bunch.data).float(), target.float() if name == "diabetes" else target.long()


def _standardized(parts: tuple[Data, Data, Data], position: int) -> tuple[Data, Data, Data]:
    """Zero mean and unit variance over the training split, at one position of the tuples."""
    reference = parts[0][position]
    mean, std = reference.mean(0), reference.std(0, correction=0)
    return tuple(tuple((x - mean) / std if i == position else x for i, x in enumerate(part)) for part in parts)  # type: ignore[return-value]


def _classification(
    name: str, parts: tuple[Data, Data, Data], build: Callable[[], nn.Module], description: str, batch_size: int
) -> Task:
    train, validation, test = parts
    return Task(
        name,
        "accuracy",
        "higher",
        seeded(build),
        supervised(cross_entropy),
        train,
        validation,
        test,
        accuracy,
        batch_size,
        description,
    )


def _digits() -> Task:
    inputs, target = _bundled("digits")
    text = "8 x 8 images of handwritten digits (scikit-learn, 1797 examples), fully connected network 64-64-10."
    return _classification("digits", split(inputs / 16, target), lambda: mlp(64, 64, 10), text, 64)


def _digits_cnn() -> Task:
    inputs, target = _bundled("digits")
    text = "8 x 8 images of handwritten digits (scikit-learn, 1797 examples), two convolutions (8, 16 channels), a linear layer."
    return _classification("digits_cnn", split(inputs.view(-1, 1, 8, 8) / 16, target), _small_cnn, text, 64)


def _breast_cancer() -> Task:
    text = "30 measurements of breast tumours, benign or malignant (scikit-learn, 569 examples), logistic regression."
    return _classification("breast_cancer", _standardized(split(*_bundled("breast_cancer")), 0), lambda: mlp(30, 2), text, 32)


def _wine() -> Task:
    text = "13 chemical measurements of wines of three growers (scikit-learn, 178 examples), fully connected network 13-16-3."
    return _classification("wine", _standardized(split(*_bundled("wine")), 0), lambda: mlp(13, 16, 3), text, 32)


def _diabetes() -> Task:
    inputs, target = _bundled("diabetes")
    train, validation, test = _standardized(_standardized(split(inputs, target.unsqueeze(1)), 0), 1)

    def root_mean_squared_error(model: nn.Module, data: Data) -> float:
        return float(mse_loss(model(data[0]), data[1]).sqrt())

    return Task(
        name="diabetes", metric="root mean squared error (standard deviations of the target)", better="lower",
        model=seeded(lambda: mlp(10, 32, 1)), objective=supervised(mse_loss), train=train, validation=validation, test=test,
        evaluate=root_mean_squared_error, batch_size=32,
        description="Progression of diabetes a year after 10 measurements (scikit-learn, 442 patients), fully connected 10-32-1.",
    )  # fmt: skip


def _stdlib_text() -> Task:
    from gradwise.bench import language_model

    return language_model.stdlib_text()


_BUILDERS: dict[str, Callable[[], Task]] = {
    "digits": _digits,
    "digits_cnn": _digits_cnn,
    "breast_cancer": _breast_cancer,
    "diabetes": _diabetes,
    "wine": _wine,
    "stdlib_text": _stdlib_text,
}
