"""How every chart of a report looks: one style a method, sizes in CSS pixels, matplotlib figures as SVG inside a page.

A method keeps one colour, one marker and one line style in every chart. The baseline is neutral; the six hues were chosen so that
any two differ by at least 9 % in OKLab as seen with normal vision, protanopia, deuteranopia and tritanopia, at a contrast of 3 or
more with the page; beyond them the line style and the marker tell methods apart. In a page, text stays text and colours become CSS
variables, so that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

LIGHT = ("#2b313b", "#1a45d1", "#bf3a0a", "#1f8a77", "#84118a", "#a88c22", "#2b98dc")
DARK = ("#e6eaf0", "#5a7df0", "#e0591c", "#6fb58c", "#b070ab", "#edc44c", "#33ccfe")
INK, MUTED, GRID, SURFACE = "#1b2029", "#5b6472", "#e3e6eb", "#ffffff"
MARKERS = "osD^vPX<>dph"
DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.6)), (0, (1, 1.3)))

Results = Mapping[str, Any]

_PAGE_COLOURS = {c: f"var(--series-{i})" for i, c in enumerate(LIGHT)} | {
    INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", SURFACE: "var(--surface)"
}  # fmt: skip
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "gradwise", "font.family": ["sans-serif"], "font.size": 11, "text.color": INK,
    "text.parse_math": False, "savefig.facecolor": SURFACE, "lines.linewidth": 1.8, "grid.color": GRID, "grid.linewidth": 0.8,
    "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "axes.labelsize": 11, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelsize": 10.5, "ytick.labelsize": 10.5, "xtick.major.size": 3, "ytick.major.size": 0, "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How one method looks everywhere: `colour` indexes LIGHT and DARK, `marker` and `dash` are matplotlib's.

    Example:
        >>> Style(colour=1, marker="s", dash="solid").marker
        's'
    """

    colour: int
    marker: str
    dash: Any


@dataclass(frozen=True)
class Chart:
    """One drawing: its title, an inline `<svg>` string, and what a reader must know to read it.

    Example:
        >>> Chart("Cost", "<svg></svg>").caption
        ''
    """

    title: str
    svg: str
    caption: str = ""


def method_styles(results: Results) -> dict[str, Style]:
    """The style of every method by name; the baseline takes the neutral colour and the first marker.

    Example:
        >>> styles = method_styles({"baseline": "adamw", "methods": [{"name": "lion"}, {"name": "adamw"}]})
        >>> styles["adamw"].colour, styles["lion"].colour, styles["lion"].marker != styles["adamw"].marker
        (0, 1, True)
    """
    baseline, hues = results.get("baseline"), len(LIGHT) - 1
    styles = {baseline: Style(0, MARKERS[0], DASHES[0])}
    for i, name in enumerate(m["name"] for m in results["methods"] if m["name"] != baseline):
        styles[name] = Style(i % hues + 1, MARKERS[(i + 1) % len(MARKERS)], DASHES[i // hues % len(DASHES)])
    return {m["name"]: styles[m["name"]] for m in results["methods"]}


def metric_name(results: Results) -> str:
    """The metric without the unit in brackets that may follow it.

    Example:
        >>> metric_name({"task": {"metric": "root mean squared error (standard deviations)"}})
        'root mean squared error'
    """
    return str(results["task"]["metric"]).partition(" (")[0]


def finite(values: Iterable[float | None]) -> list[float]:
    """The numbers that are there: nulls and non-finite values are left out.

    Example:
        >>> finite([1.0, None, float("nan")])
        [1.0]
    """
    return [float(v) for v in values if v is not None and np.isfinite(v)]


def typographic(number: str) -> str:
    """A formatted number with a true minus sign and a short exponent.

    Example:
        >>> typographic("-2.5e-07") == "\N{MINUS SIGN}2.5e\N{MINUS SIGN}7"
        True
    """
    return number.replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")


def shorten(name: str, length: int) -> str:
    """The name cut to `length` characters with an ellipsis in its middle, so that prefixes and endings both stay readable.

    Example:
        >>> shorten("adamw with refinement", 13)
        'adamw …nement'
    """
    return name if len(name) <= length else name[: length // 2] + "…" + name[len(name) - (length - length // 2 - 1) :]


def key_glyph(style: Style) -> str:
    """A piece of a method's line with its marker, as an `<svg>` of 34 by 14 pixels: the key that stands wherever its name does.

    Example:
        >>> key_glyph(Style(0, "s", "solid")).count("<path")
        2
    """
    marker = MarkerStyle(style.marker)
    path = marker.get_path().transformed(marker.get_transform())
    letters = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
    corners = [
        (letters[int(code)], "" if code == 79 else " ".join(f"{v:.2f}" for v in vertex)) for vertex, code in path.iter_segments()
    ]
    dashes = "" if style.dash == "solid" else f' stroke-dasharray="{" ".join(f"{2 * d:g}" for d in style.dash[1])}"'
    colour = f"var(--series-{style.colour})"
    return (
        '<svg class="key" viewBox="0 0 34 14" aria-hidden="true">'
        f'<path d="M1 7H33" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
        f'<path d="{"".join(a + b for a, b in corners)}" transform="translate(17 7) scale(8 -8)" fill="{colour}" stroke="{colour}" '
        f'stroke-width="{0.24 if style.marker in "|_x+" else 0}"/></svg>'
    )


def tukey_fence(values: Sequence[float]) -> tuple[float, float]:
    """Tukey's outer fence: what lies beyond three quartile ranges is not allowed to set the range of a chart.

    Example:
        >>> low, high = tukey_fence([0.96, 0.97, 0.97, 0.98, 0.1])
        >>> 0.1 < low < 0.96
        True
    """
    if len(values) < 4:
        return -np.inf, np.inf
    q1, q3 = np.quantile(values, [0.25, 0.75])
    return float(q1 - 3 * (q3 - q1) - 1e-12), float(q3 + 3 * (q3 - q1) + 1e-12)


def padded(values: Sequence[float], share: float) -> tuple[float, float]:
    """The smallest and the largest value with that share of their distance to spare; (0, 1) when there is no value.

    Example:
        >>> padded([1.0, 3.0], 0.1)
        (0.8, 3.2)
    """
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    pad = share * (high - low) or abs(high) * share or 1.0
    return low - pad, high + pad


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of that many CSS pixels under the report's settings; no pyplot and no figure outlive the block.

    Example:
        >>> with drawing(420, 285) as figure:
        ...     svg = inline(figure, "Nothing", "An empty chart.", "empty")
        >>> svg[:27]
        '<svg viewBox="0 0 420 285" '
    """
    with matplotlib.rc_context(_SETTINGS):
        yield Figure(figsize=(width / 72, height / 72), layout="constrained")  # matplotlib's SVG counts 72 pixels to an inch


def inline(figure: Figure, title: str, description: str, key: str) -> str:
    """The figure as an `<svg>` element for a page: no identifiers that clash, no namespaces, colours as CSS variables.

    Args:
        figure: what was drawn inside `drawing`.
        title: the accessible name.
        description: what the picture says, in words.
        key: a prefix that no other chart of the page uses; letters, digits and dashes.

    Example:
        >>> with drawing(100, 50) as figure:
        ...     svg = inline(figure, "a < b", "", "x")
        >>> "<title id=\\"x-title\\">a &lt; b</title>" in svg, "http" in svg
        (True, False)
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    raw = buffer.getvalue()
    body = raw[raw.index(">", raw.index("<svg")) + 1 : raw.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*</defs>", "", body).replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", body)
    body = re.sub(r'style="[^"]*"', lambda m: re.sub(r"#[0-9a-f]{6}", lambda c: _PAGE_COLOURS.get(c[0], c[0]), m[0]), body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    width, height = (round(72 * float(side)) for side in figure.get_size_inches())
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(description)}</desc>{body}</svg>'
    )
