"""gradwise: published gradient methods that compose in one training step, each with a runnable check of its paper's claim."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradwise import papers
    from gradwise.core.protocols import supervised
    from gradwise.step import Step, StepReport

__version__ = "0.1.0"
__all__ = ["Step", "StepReport", "__version__", "papers", "supervised"]

_HOMES = {"Step": "gradwise.step", "StepReport": "gradwise.step", "supervised": "gradwise.core.protocols"}


def __getattr__(name: str) -> Any:
    """Names are imported when they are asked for, so that `gradwise --help` need not wait for torch."""
    if name == "papers":
        return importlib.import_module("gradwise.papers")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
