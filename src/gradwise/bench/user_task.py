"""A user's own task, by "my_task.py:task": loading the file, checking what came back element by element, and a template."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradwise.bench.tasks import Task
from gradwise.core.errors import UserError

TEMPLATE = '''"""A task for `gradwise compare --task my_task.py:task`: model, data, objective and metric. Change what you like."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradwise import supervised
from gradwise.bench.tasks import Task, seeded, split


def task() -> Task:
    # Data: tensors whose first dimension is the example. Here two interleaved spirals; read yours from a file.
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(600) % 2
    turn = 4 * torch.rand(600, generator=generator)
    angle = turn + torch.pi * target
    inputs = torch.stack([turn * angle.cos(), turn * angle.sin()], 1) + 0.1 * torch.randn(600, 2, generator=generator)
    train, validation, test = split(inputs, target)  # tuning looks at validation, only the final figure at test

    # Model: built anew for each run, with initial weights drawn from the generator that `seeded` takes.
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2)))

    # Metric: any number of (model, split); the model is in evaluation mode and no gradient is kept.
    def accuracy(model: nn.Module, data: tuple[torch.Tensor, ...]) -> float:
        inputs, target = data
        return float((model(inputs).argmax(1) == target).float().mean())

    return Task(
        name="spirals",
        metric="accuracy",
        better="higher",  # or "lower"
        model=model,
        objective=supervised(cross_entropy),  # or any (model, batch) -> scalar
        train=train,
        validation=validation,
        test=test,
        evaluate=accuracy,
        batch_size=32,
        description="Two interleaved spirals, fully connected network 2-32-2.",
    )
'''
"""What `gradwise new-task` prints."""


def load(reference: str) -> Task:
    """Import a file and call its function; check what it returns.

    Args:
        reference: "path/to/my_task.py:task".

    Raises:
        UserError: the file or function does not exist or fails (with the line), or returned something that is not a task (which
            element, what was expected).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "my_task.py")
        >>> _ = path.write_text(TEMPLATE)
        >>> load(f"{path}:task").name
        'spirals'
    """
    file, _, name = reference.rpartition(":")
    if not file or not name.isidentifier():
        raise UserError(f"a task of your own is named FILE.py:FUNCTION, such as my_task.py:task; got {reference!r}")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"task {reference!r}: there is no file {file} (`gradwise new-task > my_task.py` writes one to start from)")
    return _loaded(reference, path, name, source_hash(reference))


@functools.lru_cache(maxsize=8)
def _loaded(reference: str, path: Path, name: str, source: str) -> Task:
    """`source` is the file's hash: a file that has changed is loaded again."""
    module = _imported(path)
    function = getattr(module, name, None)
    if function is not None and not callable(function):
        raise UserError(f"task {reference!r}: expected a function {name!r} in {path.name}, got {_shown(function)}")
    if function is None:
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        near = difflib.get_close_matches(name, own, n=2)
        raise UserError(
            f"task {reference!r}: {path.name} has no function {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    task = _guarded(function, path, f"{name}()")
    check(task, reference)
    return task


def source_hash(reference: str) -> str:
    """SHA-256 of a user's task file, so that a results folder knows when the file has changed; "" for built-in tasks.

    Example:
        >>> source_hash("digits")
        ''
    """
    if ".py" not in reference:
        return ""
    return hashlib.sha256(Path(reference.rpartition(":")[0]).expanduser().read_bytes()).hexdigest()


def check(task: Any, reference: str) -> None:
    """See that a task is one, by building its model, taking one gradient and evaluating it once.

    Raises:
        UserError: every element that is wrong and what was expected of it.

    Example:
        >>> check(3, "my_task.py:task")
        Traceback (most recent call last):
        gradwise.core.errors.UserError: task 'my_task.py:task' must return a gradwise.bench.tasks.Task, got int
    """
    if not isinstance(task, Task):
        raise UserError(f"task {reference!r} must return a gradwise.bench.tasks.Task, got {type(task).__name__}")
    problems = _wrong_values(task) or _wrong_behaviour(task)
    if problems:
        raise UserError(
            f"task {reference!r} returned a Task with wrong elements:\n" + "\n".join(f"  {problem}" for problem in problems)
        )


def _wrong_values(task: Task) -> list[str]:
    problems = []
    for name in ("name", "metric", "description"):
        if not isinstance(getattr(task, name), str):
            problems.append(f"{name}: expected a string, got {_shown(getattr(task, name))}")
    if task.better not in ("higher", "lower"):
        problems.append(f'better: expected "higher" or "lower", got {task.better!r}')
    if not isinstance(task.batch_size, int) or task.batch_size < 1:
        problems.append(f"batch_size: expected a positive integer, got {task.batch_size!r}")
    for name in ("model", "objective", "evaluate"):
        if isinstance(getattr(task, name), nn.Module) and name == "model":
            problems.append(
                "model: expected a function that builds the model from a torch.Generator (each run starts anew), got the model"
            )
        elif not callable(getattr(task, name)):
            problems.append(f"{name}: expected a function, got {_shown(getattr(task, name))}")
    lengths = set()
    for name in ("train", "validation", "test"):
        data = getattr(task, name)
        if not isinstance(data, tuple) or not data or not all(isinstance(x, Tensor) for x in data):
            problems.append(f"{name}: expected a tuple of tensors, got {_shown(data)}")
            continue
        lengths.add(len(data))
        if any(x.ndim == 0 for x in data) or len({len(x) for x in data}) != 1 or len(data[0]) == 0:
            problems.append(
                f"{name}: expected tensors with the same first dimension, at least 1, got shapes {[tuple(x.shape) for x in data]}"
            )
    if len(lengths) > 1:
        problems.append(f"train, validation, test: expected the same number of tensors in each, got {sorted(lengths)}")
    return problems


def _wrong_behaviour(task: Task) -> list[str]:
    model, problem = _attempt(lambda: task.model(torch.Generator().manual_seed(0)), "model(generator)")
    if problem:
        return [problem]
    if not isinstance(model, nn.Module):
        return [f"model: expected a function that returns a torch.nn.Module, got {_shown(model)}"]
    if not any(p.requires_grad for p in model.parameters()):
        return ["model: expected at least one parameter that requires a gradient, got none"]
    again = task.model(torch.Generator().manual_seed(0))
    if any(not torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)):
        return [
            "model: expected the same initial weights from the same generator, got others; use gradwise.bench.tasks.seeded"
        ]
    problems = []
    loss, problem = _attempt(lambda: task.objective(model, next(task.batches(0))), "objective(model, batch)")
    if problem:
        problems.append(problem)
    elif not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        problems.append(f"objective: expected a scalar tensor that depends on the model's parameters, got {_shown(loss)}")
    model.eval()
    for name, data in (("validation", task.validation), ("test", task.test)):
        with torch.no_grad():
            value, problem = _attempt(functools.partial(task.evaluate, model, data), f"evaluate(model, {name})")
        if problem:
            problems.append(problem)
        elif not isinstance(value, float | int) or isinstance(value, bool) or not math.isfinite(value):
            problems.append(f"evaluate: expected a finite number on the {name} split, got {_shown(value)}")
    return problems


def _attempt(call: Callable[[], Any], what: str) -> tuple[Any, str | None]:
    try:
        return call(), None
    except (Exception, SystemExit) as error:
        return None, f"{what}: expected to work, but raised {type(error).__name__}: {error}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" + ("" if value.requires_grad else " without gradient")
    if isinstance(value, tuple | list) and value and not all(isinstance(x, Tensor) for x in value):
        return f"{type(value).__name__} of {', '.join(type(x).__name__ for x in value[:4])}{', ...' if len(value) > 4 else ''}"
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) < 60 else type(value).__name__


def _imported(path: Path) -> Any:
    name = f"gradwise_user_task_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that the file may import its neighbours
    loader = spec.loader
    _guarded(lambda: loader.exec_module(module), path, "importing the file")
    return module


def _guarded(call: Callable[[], Any], path: Path, what: str) -> Any:
    try:
        return call()
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
        where = f", line {line}" if line else ""
        raise UserError(f"{path.name}{where}: {what} raised {type(error).__name__}: {error}") from error
