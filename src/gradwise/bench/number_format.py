"""Numbers as people read them: three significant digits, SI bytes, times in a fitting unit, p-values without false precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from gradwise.bench.chart_style import typographic

ABSENT = "\N{EN DASH}"  # stands for "no value" all over the page


def decimals(values: Sequence[float], halves: Sequence[float]) -> int:
    """Decimals that a whole column shares: three significant digits of its largest value, more for finer intervals.

    Args:
        values: the column; empty when the intervals alone are to decide.
        halves: half widths of intervals, whose median gets at least one significant digit.

    Example:
        >>> decimals([97.2, 96.1], [0.4]), decimals([97.2, 96.1], [0.004]), decimals([0.0123], []), decimals([], [0.05])
        (1, 3, 4, 2)
    """
    top = max((abs(v) for v in values), default=0.0)
    sizes = sorted(h for h in halves if h > 0)
    needs = [2 - math.floor(math.log10(top))] if top > 0 else []
    needs += [-math.floor(math.log10(sizes[len(sizes) // 2]))] if sizes else []
    return max(0, min(8, max(needs, default=2)))


def fixed(value: float | None, places: int, signed: bool = False) -> str:
    """A value with a fixed number of decimals.

    Example:
        >>> fixed(0.9712, 2), fixed(0.004, 4, signed=True), fixed(-0.0001, 2), fixed(None, 2)
        ('0.97', '+0.0040', '0.00', '–')
    """
    # + 0.0 makes a zero of -0.0, which rounding leaves of a small negative value
    return ABSENT if value is None else typographic(f"{round(value, places) + 0.0:{'+' if signed else ''}.{places}f}")


def pair(low: float | None, high: float | None, places: int, signed: bool = False) -> str:
    """The two ends of an interval.

    Example:
        >>> pair(0.96, 0.98, 3), pair(None, None, 1)
        ('0.960 to 0.980', '')
    """
    return "" if low is None or high is None else f"{fixed(low, places, signed)} to {fixed(high, places, signed)}"


def number(value: float | None, digits: int = 3) -> str:
    """A number for people, to three significant digits; counts keep all theirs.

    Example:
        >>> [number(v) for v in (0.012345, 1234567.0, 2.5e-7, -3.14159, None)]
        ['0.0123', '1,234,567', '2.5e−7', '−3.14', '–']
    """
    if value is None:
        return ABSENT
    return typographic(f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}")


def count(value: float) -> str:
    """A count with separators.

    Example:
        >>> count(4810), count(2.5)
        ('4,810', '2.5')
    """
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def byte_size(value: float | None) -> str:
    """Bytes in SI units, to three significant digits.

    Example:
        >>> byte_size(19240), byte_size(999_999), byte_size(412), byte_size(None)
        ('19.2 kB', '1 MB', '412 B', '–')
    """
    if value is None:
        return ABSENT
    for unit in ("B", "kB", "MB", "GB", "TB"):
        text = f"{value:.3g}"
        if float(text) < 1000 or unit == "TB":
            return f"{float(text):g} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    """Seconds in the unit in which they are easiest to read, to three significant digits.

    Example:
        >>> duration(0.00412), duration(0.0000031), duration(75.2), duration(7200.0)
        ('4.12 ms', '3.1 µs', '75.2 s', '2 h')
    """
    if seconds is None:
        return ABSENT
    for size, unit in ((3600, "h"), (120, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / (60 if unit == 'min' else size):.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def p_value(p: float | None) -> str:
    """A p-value without false precision, and never rounded onto the level 0.05 from either side.

    Example:
        >>> [p_value(p) for p in (0.0004, 0.0041, 0.034, 0.0478, 0.27, 0.999, 1.0)]
        ['< 0.001', '0.004', '0.03', '0.048', '0.27', '> 0.99', '1']
    """
    if p is None:
        return ABSENT
    if p < 0.001 or 0.995 <= p < 1:
        return "< 0.001" if p < 0.001 else "> 0.99"
    if p >= 1 or p < 0.01:
        return "1" if p >= 1 else f"{p:.3f}"
    return f"{p:.4f}" if 0.0495 <= p < 0.05 else f"{p:.3f}" if 0.045 <= p < 0.055 else f"{p:.2f}"


def setting(value: Any) -> str:
    """The value of a hyper-parameter: numbers to four significant digits, everything else as it is.

    Example:
        >>> setting(0.00123456), setting(True), setting("cosine"), setting(None)
        ('0.001235', 'true', 'cosine', '–')
    """
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else ", ".join(map(setting, value)) if isinstance(value, list) else str(value)


def moment(text: str) -> str:
    """An ISO time for people.

    Example:
        >>> moment("2025-03-04T05:06:07+00:00"), moment("yesterday")
        ('4 March 2025, 05:06 UTC', 'yesterday')
    """
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{when.day} {when:%B %Y, %H:%M} {when.tzname() or ''}".strip()
