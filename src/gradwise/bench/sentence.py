"""A method as data: the words of a sentence in their places, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SLOTS = ("loss", "estimator", "transforms", "optimizer", "schedule", "parametrization")
"""The places of a sentence, in the order in which the report shows them."""


@dataclass(frozen=True)
class Word:
    """One word and the arguments it is said with.

    Example:
        >>> str(Word("clip_norm", {"max_norm": 1.0}))
        'clip_norm(max_norm=1.0)'
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        said = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.name}({said})" if said else self.name


@dataclass(frozen=True)
class Sentence:
    """A method as `compare` sees it: which word stands in each place. None: the task's own loss, backpropagation, a constant rate.

    Example:
        >>> Sentence(Word("sgd"), transforms=(Word("clip_norm", {"max_norm": 1.0}),)).strings()["transforms"]
        'clip_norm(max_norm=1.0)'
    """

    optimizer: Word
    loss: Word | None = None
    estimator: Word | None = None
    transforms: tuple[Word, ...] = ()
    schedule: Word | None = None
    parametrization: Word | None = None

    def words(self) -> list[tuple[str, Word]]:
        """Every word said, with its place.

        Example:
            >>> Sentence(Word("lion")).words()
            [('optimizer', Word(name='lion', arguments={}))]
        """
        said: list[tuple[str, Word]] = []
        for slot in SLOTS:
            value = getattr(self, slot)
            said += [(slot, word) for word in (value if isinstance(value, tuple) else (value,)) if word is not None]
        return said

    def strings(self) -> dict[str, str]:
        """Each place in words, for people.

        Example:
            >>> Sentence(Word("lion")).strings()["estimator"]
            'backprop'
        """
        default = {
            "loss": "the task's own",
            "estimator": "backprop",
            "transforms": "none",
            "schedule": "constant",
            "parametrization": "none",
        }
        said = self.words()
        return {slot: ", ".join(str(w) for place, w in said if place == slot) or default[slot] for slot in SLOTS}
