"""The fields of a recipe: what may be written for a word, a range, the seeds and the budget, and what each means."""

from __future__ import annotations

import math
from typing import Any

from gradwise.bench.sentence import Word
from gradwise.core.errors import unknown
from gradwise.core.search_space import Choice, LogUniform, Range, Uniform

BUDGETS = ("steps", "seconds", "forwards", "bytes")


def word(value: Any) -> Word:
    """A word of a sentence: its name, or a table of its name and arguments.

    Raises:
        ValueError: neither.

    Example:
        >>> word({"name": "clip_norm", "max_norm": 1.0})
        Word(name='clip_norm', arguments={'max_norm': 1.0})
    """
    if isinstance(value, Word):
        return value
    if isinstance(value, str) and value:
        return Word(value)
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return Word(value["name"], {key: v for key, v in value.items() if key != "name"})
    raise ValueError(
        f'expected a word such as "clip_norm" or a table such as {{name = "clip_norm", max_norm = 1.0}}, got {value!r}'
    )


def listed(value: Any) -> Any:
    """One word where several may stand is a list of one.

    Example:
        >>> listed("clip_norm")
        ['clip_norm']
    """
    return value if isinstance(value, list | tuple) else [value]


def search_range(value: Any) -> Range:
    """A range to tune in: {low, high} with log = true for a log-uniform one, or {values}.

    Raises:
        ValueError: neither, or bounds in the wrong order.

    Example:
        >>> search_range({"low": 1e-3, "high": 1.0, "log": True})
        LogUniform(low=0.001, high=1.0)
    """
    if isinstance(value, dict) and set(value) == {"values"} and isinstance(value["values"], list) and value["values"]:
        if all(isinstance(v, bool | str | None) or _is_number(v) for v in value["values"]):
            return Choice(tuple(value["values"]))
    elif isinstance(value, dict) and {"low", "high"} <= set(value) <= {"low", "high", "log"}:
        low, high, log = value["low"], value["high"], value.get("log", False)
        if isinstance(log, bool) and all(map(_is_number, (low, high))):
            return (LogUniform if log else Uniform)(float(low), float(high))
    raise ValueError(f"expected {{low = ..., high = ..., log = true}} or {{values = [...]}} with finite numbers, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def seeds(value: Any) -> tuple[int, ...]:
    """The seeds of the final runs: how many, or which.

    Raises:
        ValueError: fewer than two, or not different whole numbers.

    Example:
        >>> seeds(3), seeds([7, 1])
        ((0, 1, 2), (7, 1))
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if not 2 <= value <= 1000:
            raise ValueError(f"expected at least 2 (intervals need them) and at most 1000, got {value}")
        return tuple(range(value))
    integers = isinstance(value, list | tuple) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31 for v in value
    )
    if integers and 2 <= len(set(value)) == len(value):
        return tuple(value)
    raise ValueError(f"expected a number of seeds or a list of at least two different integers from 0 to 2^31 - 1, got {value!r}")


def budget(value: Any) -> dict[str, Any]:
    """A budget's kind and amount, from {steps = 300} or "steps=300".

    Raises:
        ValueError: not one kind with its amount; an unknown kind, with the nearest ones.

    Example:
        >>> budget("seconds=1.5")
        {'kind': 'seconds', 'amount': 1.5}
    """
    expected = 'expected one of steps, seconds, forwards or bytes with its amount, such as {steps = 300} or "steps=300"'
    given = value
    if isinstance(value, str):
        kind, _, amount = value.partition("=")
        try:
            value = {kind.strip(): float(amount) if kind.strip() == "seconds" else int(amount)}
        except ValueError:
            raise ValueError(f"{expected}, got {given!r}") from None
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"{expected}, got {given!r}")
    ((kind, amount),) = value.items()
    if kind not in BUDGETS:
        raise unknown("budget", str(kind), BUDGETS)
    return {"kind": kind, "amount": amount}
