"""One training run from start to finish, as a pure function: the same arguments give the same numbers, wherever it runs.

At one seed every method starts from the same weights and sees the same batches in the same order. A run that diverges (nan, inf,
no memory left) is a result with a reason. Tuning never looks at the test split: it is evaluated only when asked for, once, at
the end.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from gradwise.bench import tasks, words
from gradwise.bench.one_thread import one_thread
from gradwise.bench.recipe import Budget
from gradwise.bench.sentence import Sentence
from gradwise.bench.tasks import Data, Task
from gradwise.bench.words import derived_seed
from gradwise.core.cost import tensor_bytes
from gradwise.core.errors import UserError
from gradwise.step import Step, StepReport

EVALUATIONS = 25
"""Evaluations on the validation split over a run, beside the one before the first step."""

_EXPLODED = 1e10
_NOT_FINITE = re.compile(r"\b(nan|inf|infinity|infinite|non-?finite|finite)\b", re.IGNORECASE)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator")


class _Diverged(ArithmeticError):
    """The run cannot go on; the message says why."""


@dataclass
class _Record:
    """What a run has cost so far, and its curve."""

    steps: int = 0
    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0
    gradient_bytes: int = 0
    peak_bytes: int | None = None
    state_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    curve: dict[str, list[Any]] = field(
        default_factory=lambda: {key: [] for key in ("step", "seconds", "forwards", "bytes", "train_loss", "validation")}
    )

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.seconds += report.seconds
        self.forwards += report.forwards
        self.backwards += report.backwards
        self.gradient_bytes += report.gradient_bytes
        self.losses.append(report.loss)

    def spent(self, kind: str) -> float:
        return self.gradient_bytes if kind == "bytes" else getattr(self, kind)

    def point(self, validation: float) -> None:
        loss = sum(self.losses) / len(self.losses) if self.losses else None
        row = (self.steps, self.seconds, self.forwards, self.gradient_bytes, _finite(loss), _finite(validation))
        for series, value in zip(self.curve.values(), row, strict=True):
            series.append(value)
        self.losses = []

    def cost(self) -> dict[str, Any]:
        names = ("steps", "seconds", "forwards", "backwards", "gradient_bytes", "peak_bytes", "state_bytes")
        return {name: getattr(self, name) for name in names}


def run_trial(
    task: str | Task,
    sentence: Sentence,
    hyper: Mapping[str, Any],
    *,
    seed: int,
    budget: Budget,
    number: int = 0,
    test: bool = False,
    data_hash: str = "",
) -> dict[str, Any]:
    """Train one model and say how it went.

    Args:
        task: a task or its name.
        sentence: the method.
        hyper: values of its knobs.
        seed: of the initial weights, the order of the data and every other draw.
        budget: what the run may spend; it stops before a step that would exceed a budget of forwards or bytes.
        number: kept in the result.
        test: evaluate the test split at the end.
        data_hash: what the task's data must be; "" is not checked.

    Returns:
        The trial as JSON data (numbers that are not finite are None): number, seed, hyper, status ("complete" or "diverged"),
        reason, curve (step, seconds, forwards, bytes, train_loss: the mean since the point before, validation), validation (the
        last), test, cost.

    Raises:
        UserError: a sentence that cannot be built on this task, or data other than `data_hash` says.
        Exception: whatever a task's or a method's own code raises that is no divergence.

    Example:
        >>> from gradwise.bench.sentence import Word
        >>> trial = run_trial("wine", Sentence(Word("sgd")), {"lr": 0.1}, seed=0, budget=Budget(kind="steps", amount=50))
        >>> trial["status"], trial["cost"]["steps"], trial["validation"] > 0.9, trial["test"]
        ('complete', 50, True, None)
    """
    task = tasks.load(task) if isinstance(task, str) else task
    if data_hash and _data_hash(task) != data_hash:
        raise UserError(f"task {task.name!r} has other data each time it is loaded: draw it from a generator with a fixed seed")
    record, reason = _Record(), None
    model = validation = tested = None
    with one_thread(), _isolated(seed):
        try:
            record.peak_bytes, total_steps = _probe(task, sentence, hyper, seed, budget)
            model, step = _prepared(task, sentence, hyper, seed, total_steps)
            validation = _train(task, model, step, seed, budget, total_steps, record)
            tested = _evaluated(task, model, task.test) if test else None
            record.state_bytes = tensor_bytes(step.optimizer.state)
        except UserError:
            raise
        except (ArithmeticError, MemoryError, ValueError, RuntimeError) as error:
            if not _is_divergence(error, model):
                raise
            reason, validation = _told(error, record.steps), None
    status = "complete" if reason is None else "diverged"
    return {
        "number": number, "seed": seed, "hyper": dict(hyper), "status": status, "reason": reason,
        "curve": record.curve, "validation": validation, "test": tested, "cost": record.cost(),
    }  # fmt: skip


def died(job: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """The trial of a run that nobody lived to report.

    Args:
        job: the keyword arguments it was given to `run_trial`.
        reason: what is known of its end.

    Example:
        >>> died({"seed": 3, "hyper": {"lr": 1.0}}, "the process was killed")["status"]
        'diverged'
    """
    empty = _Record()
    return {
        "number": job.get("number", 0), "seed": job["seed"], "hyper": dict(job["hyper"]), "status": "diverged", "reason": reason,
        "curve": empty.curve, "validation": None, "test": None, "cost": empty.cost(),
    }  # fmt: skip


def rehearse(task: Task, sentence: Sentence, hyper: Mapping[str, Any]) -> StepReport | None:
    """Take one step of a sentence on a task, so that words which cannot stand there are refused before any work is done.

    Returns:
        The step's report; None when it diverged at once, which is a result that the trials will report.

    Raises:
        UserError: with the reason.

    Example:
        >>> from gradwise.bench.sentence import Word
        >>> rehearse(tasks.load("diabetes"), Sentence(Word("sgd"), loss=Word("cross_entropy")), {"lr": 0.1})
        Traceback (most recent call last):
        gradwise.core.errors.UserError: loss cross_entropy: task 'diabetes' is not supervised classification, its objective
        cannot be replaced
    """
    with one_thread(), _isolated(0):
        _, step = _prepared(task, sentence, hyper, 0, total_steps=100)
        try:
            return step(next(task.batches(0)))
        except Exception as error:
            if _is_divergence(error, step.model):
                return None
            raise UserError(f"one step on task {task.name!r} raised {type(error).__name__}: {error}") from error


def _prepared(
    task: Task, sentence: Sentence, hyper: Mapping[str, Any], seed: int, total_steps: int, measure_memory: bool = False
) -> tuple[nn.Module, Step]:
    model = task.model(torch.Generator().manual_seed(derived_seed(seed, "initialisation")))
    model.train()
    return model, words.build_step(sentence, hyper, task, model, seed=seed, total_steps=total_steps, measure_memory=measure_memory)


def _probe(task: Task, sentence: Sentence, hyper: Mapping[str, Any], seed: int, budget: Budget) -> tuple[int | None, int]:
    """Peak bytes of one step and the number of steps the budget allows, measured on a model that is thrown away."""
    with _isolated(seed), _no_collection():
        _, step = _prepared(task, sentence, hyper, seed, total_steps=100, measure_memory=True)
        batches = task.batches(derived_seed(seed, "data"))
        report = step(next(batches))
        if budget.kind == "steps":
            return report.peak_bytes, int(budget.amount)
        if budget.kind == "seconds":
            step.measure_memory = False
            price: float = min(step(batch).seconds for batch in itertools.islice(batches, 3)) if sentence.schedule else 0.0
            return report.peak_bytes, max(1, int(budget.amount / price)) if price else 2**62
        price = report.forwards if budget.kind == "forwards" else report.gradient_bytes
        return report.peak_bytes, max(1, int(budget.amount // max(price, 1)))


def _train(task: Task, model: nn.Module, step: Step, seed: int, budget: Budget, total_steps: int, record: _Record) -> float:
    record.point(_evaluated(task, model, task.validation, may_fail=True))
    first: float | None = None
    due, before = 1, 0.0
    for batch in task.batches(derived_seed(seed, "data")):
        report = step(batch)
        record.add(report)
        first = abs(report.loss) if first is None else first
        if not math.isfinite(report.loss) or abs(report.loss) > _EXPLODED * (1 + first):
            raise _Diverged(f"the training loss became {report.loss:g}")
        spent = record.spent(budget.kind)
        whole = budget.kind != "seconds" and spent + (spent - before) > budget.amount
        before = spent
        over = whole or spent >= budget.amount or record.steps >= total_steps
        if over or spent >= due * budget.amount / EVALUATIONS:
            due = int(spent * EVALUATIONS / budget.amount) + 1
            record.point(_evaluated(task, model, task.validation))
        if over:
            break
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise _Diverged("a parameter is not finite")
    return float(record.curve["validation"][-1])


def _evaluated(task: Task, model: nn.Module, data: Data, may_fail: bool = False) -> float:
    model.eval()
    with torch.no_grad():
        value = float(task.evaluate(model, data))
    model.train()
    if not math.isfinite(value) and not may_fail:
        raise _Diverged(f"the {task.metric} became {value:g}")
    return value


def _is_divergence(error: Exception, model: nn.Module | None) -> bool:
    """Whether numbers or memory ran out, rather than a mistake in somebody's code having been met."""
    algebra = isinstance(error, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
    if algebra or isinstance(error, ArithmeticError) or _is_out_of_memory(error):
        return True
    exploded = model is not None and not all(bool((p.abs() < _EXPLODED).all()) for p in model.parameters())  # nan is not < either
    return isinstance(error, ValueError | RuntimeError) and (exploded or _NOT_FINITE.search(str(error)) is not None)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _told(error: Exception, steps: int) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if _is_out_of_memory(error):
        text = f"out of memory ({text})"
    elif not isinstance(error, _Diverged):
        text = f"{type(error).__name__}: {text}"
    return f"{text}, at step {steps}"


@functools.lru_cache(maxsize=8)
def _data_hash(task: Task) -> str:
    return task.data_hash()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """Global random states a function of the seed inside (dropout, a user's own task draw from them) and as they were outside."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        derived = derived_seed(seed, "global")
        torch.manual_seed(derived)
        random.seed(derived)
        np.random.seed(derived % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside: when it strikes depends on what ran before, and what it frees would change the peak."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
