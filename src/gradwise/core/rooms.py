"""Rooms export every public name of their files; nothing is listed by hand.

A file that also shows something of core's names it in its `__all__`. A room's `__init__.py` calls `public_names`. Type checkers cannot
follow that, so `make stubs` writes the same names into the room's `__init__.pyi`, and `make check` fails while a stub is out of date.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

ROOMS = (
    "optim", "estimators", "transforms", "multitask", "losses", "rl", "preference", "parametrize", "nn", "distributed", "privacy",
    "bilevel", "solvers", "data", "search", "meta", "curvature", "attribution", "attacks", "diffusion", "physics",
)  # fmt: skip


def public_names(package: str) -> dict[str, Any]:
    """Import every file of a room and return its public classes and functions, by name.

    Args:
        package: the room's full name, such as "gradwise.optim".

    Raises:
        ImportError: two files of the room define the same public name.

    Example:
        >>> public_names("gradwise.losses")["CompSumLoss"].__module__
        'gradwise.losses.comp_sum'
    """
    found: dict[str, Any] = {}
    for info in sorted(pkgutil.iter_modules(importlib.import_module(package).__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package}.{info.name}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__ or name in getattr(module, "__all__", ())
            if name.startswith("_") or not own or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if name in found:
                raise ImportError(f"{package}: both {found[name].__module__} and {module.__name__} define {name}")
            found[name] = value
    return dict(sorted(found.items()))


def existing_rooms() -> list[str]:
    """The rooms that this installation has, in the order of the sentence.

    Example:
        >>> "optim" in existing_rooms()
        True
    """
    here = Path(__file__).parent.parent
    return [room for room in ROOMS if (here / room / "__init__.py").exists()]
