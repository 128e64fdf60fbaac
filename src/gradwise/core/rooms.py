"""Rooms export every public name of their files; nothing is listed by hand.

A room's `__init__.py` calls `public_names`. Type checkers cannot follow that, so `python -m gradwise.core.rooms` writes the same names into
the room's `__init__.pyi`; `make check` fails while a stub is out of date.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
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
            if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)) or value.__module__ != module.__name__:
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


def stub(room: str) -> str:
    """The text of a room's `__init__.pyi`.

    Example:
        >>> "from gradwise.optim.lion import Lion as Lion" in stub("optim")
        True
    """
    lines = sorted(f"from {value.__module__} import {name} as {name}" for name, value in public_names(f"gradwise.{room}").items())
    return "\n".join(["# Written by `python -m gradwise.core.rooms`; do not edit.", *lines, ""])


def main(check: bool) -> int:
    """Write every stub, or with `check` only say which are out of date; returns the exit code.

    Example:
        >>> main(check=True)
        0
    """
    late = 0
    for room in existing_rooms():
        path, text = Path(__file__).parent.parent / room / "__init__.pyi", stub(room)
        if not path.exists() or path.read_text() != text:
            if check:
                print(f"{path} is out of date: run `python -m gradwise.core.rooms`")
                late = 1
            else:
                path.write_text(text)
    return late


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
