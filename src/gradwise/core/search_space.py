"""What a method lets be tuned: each method declares its own `search_space`, a dict from hyper-parameter to one of these ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class LogUniform:
    """A positive real number whose logarithm is uniform between those of `low` and `high`.

    Example:
        >>> LogUniform(1e-5, 1e-1).low
        1e-05
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"LogUniform needs 0 < low < high, got low={self.low}, high={self.high}")


@dataclass(frozen=True)
class Uniform:
    """A real number, uniform between `low` and `high`.

    Example:
        >>> Uniform(0.0, 0.9).high
        0.9
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"Uniform needs low < high, got low={self.low}, high={self.high}")


@dataclass(frozen=True)
class Choice:
    """One of a few values (numbers, strings, booleans or None).

    Example:
        >>> Choice((0.0, 0.01, 0.1)).values
        (0.0, 0.01, 0.1)
    """

    values: tuple[float | int | str | bool | None, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("Choice needs at least one value")


Range: TypeAlias = LogUniform | Uniform | Choice
SearchSpace: TypeAlias = dict[str, Range]
