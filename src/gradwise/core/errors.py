"""Mistakes that a user can mend: one exception, which the command line prints as one line and ends with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user asked for cannot be done; the message names what was given and what was expected.

    Example:
        >>> raise UserError("--seeds must be at least 2, got 1")
        Traceback (most recent call last):
        gradwise.core.errors.UserError: --seeds must be at least 2, got 1
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest ones that do.

    Args:
        kind: what was named, such as "task" or "method".
        name: the name that was given.
        known: every name that exists.

    Example:
        >>> str(unknown("method", "adamm", ["adamw", "lion", "sgd"]))
        "unknown method 'adamm'; did you mean 'adamw'? (known: adamw, lion, sgd)"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    shown = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
    return UserError(f"unknown {kind} {name!r}{hint} (known: {shown})")
