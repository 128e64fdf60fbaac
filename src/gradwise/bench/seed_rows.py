"""One line of dots a method, one dot a seed: what a mean and its interval are made of.

Dots of one seed belong together: all methods saw the same initial parameters and the same order of the data there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gradwise.bench.chart_style import (
    GRID,
    INK,
    LIGHT,
    MUTED,
    SURFACE,
    Results,
    finite,
    method_styles,
    metric_name,
    padded,
    shorten,
    tukey_fence,
    typographic,
)
from gradwise.bench.results import worst_cases
from gradwise.bench.statistics import fill_diverged


@dataclass(frozen=True)
class Row:
    """One method of a row chart: a dot a seed, their mean and its 95 % interval.

    A dot is a value and whether a diverged run is behind it; such a run has the worst figure of all, as in the statistics
    (`gradwise.bench.results.worst_cases`).

    Example:
        >>> Row("lion", [(0.97, False)], 0.97, None, None).name
        'lion'
    """

    name: str
    dots: list[tuple[float, bool]]
    mean: float | None
    low: float | None
    high: float | None


def value_rows(results: Results) -> list[Row]:
    """The test metric of every seed of every method.

    Example:
        >>> run = {"seed": 0, "test": 0.5, "status": "complete", "curve": {"validation": [0.1]}}
        >>> method = {"name": "sgd", "runs": [run], "summary": {"mean": 0.5}}
        >>> value_rows({"task": {"better": "higher"}, "methods": [method]})[0].dots
        [(0.5, False)]
    """
    dots = _figures(results)
    return [
        Row(m["name"], list(dots[m["name"]].values()), *(m["summary"].get(k) for k in ("mean", "low", "high")))
        for m in results["methods"]
    ]


def difference_rows(results: Results) -> list[Row]:
    """Each compared method's test metric minus the baseline's on the same seed, after a row for the baseline itself.

    Example:
        >>> difference_rows({"task": {"better": "higher"}, "methods": [], "comparisons": [], "baseline": "sgd"})
        []
    """
    dots = _figures(results)
    base = dots.get(results["baseline"], {})
    rows = []
    for c in results["comparisons"]:
        own = dots.get(c["method"], {})
        gaps = [(own[seed][0] - base[seed][0], own[seed][1] or base[seed][1]) for seed in own if seed in base]
        rows.append(Row(c["method"], gaps, c["difference"], c["low"], c["high"]))
    return [Row(results["baseline"], [], 0.0, None, None), *rows] if rows else []


def _figures(results: Results) -> dict[str, dict[int, tuple[float, bool]]]:
    """By method and seed: the test figure, the worst of all for a run that diverged, and whether it did."""
    runs = {m["name"]: {r["seed"]: r["test"] if r["status"] == "complete" else None for r in m["runs"]} for m in results["methods"]}
    if not finite(v for own in runs.values() for v in own.values()):
        return {name: {} for name in runs}
    known = worst_cases(results["methods"])
    filled = {name: fill_diverged(list(own.values()), known, results["task"]["better"]) for name, own in runs.items()}
    return {name: {seed: (v, own[seed] is None) for seed, v in zip(own, filled[name], strict=True)} for name, own in runs.items()}


def ranked(results: Results, rows: Sequence[Row]) -> list[Row]:
    """Best mean first; a row without a mean comes last.

    Example:
        >>> rows = [Row("a", [], 0.1, None, None), Row("b", [], None, None, None), Row("c", [], 0.2, None, None)]
        >>> [r.name for r in ranked({"task": {"better": "higher"}}, rows)]
        ['c', 'a', 'b']
    """
    sign = -1 if results["task"]["better"] == "higher" else 1
    return sorted(rows, key=lambda r: (r.mean is None, sign * (r.mean or 0.0)))


def draw_rows(axes: Axes, results: Results, rows: Sequence[Row], *, differences: bool) -> list[str]:
    """Draw one line of dots a method, its name above it, so that long names cost no width.

    Args:
        axes: where to draw; its limits, ticks and labels are set.
        results: a results.json of schema 1.
        rows: what to draw, from the top.
        differences: whether the values are differences to the baseline.

    Returns:
        The names of the methods that leave the range shown; their dots are arrows at its edge.

    Example:
        >>> from gradwise.bench.chart_style import drawing
        >>> empty = {"task": {"metric": "R2", "better": "higher"}, "methods": []}
        >>> with drawing(420, 100) as figure:
        ...     draw_rows(figure.add_subplot(), empty, [], differences=False)
        []
    """
    styles = method_styles(results)
    higher = results["task"]["better"] == "higher"
    means = finite(r.mean for r in rows)
    fence = tukey_fence(means)
    inside = [r for r in rows if r.mean is not None and fence[0] <= r.mean <= fence[1]]
    spread = [v for r in inside for v in finite([*(v for v, _ in r.dots), r.mean, r.low, r.high])] + ([0.0] if differences else [])
    low, high = padded(spread, 0.07)
    outside = []
    for i, row in enumerate(rows):
        style = styles[row.name]
        colour = LIGHT[style.colour]
        name = axes.annotate(shorten(row.name, 46), (0.0, i), xycoords=axes.get_yaxis_transform(), va="bottom", fontsize=11)
        name.set(position=(0, 9), anncoords="offset points")
        axes.axhline(i, color=GRID, lw=0.8, zorder=1)
        if row.low is not None and row.high is not None:
            ends = [row.low, row.high]
            axes.plot(ends, [i, i], color=colour, lw=2, solid_capstyle="butt", alpha=0.5)
        if row.mean is not None:
            axes.plot([row.mean], [i], "|", color=colour, ms=15, mew=2.6)
        placed: list[float] = []
        for v, diverged in row.dots:
            edge = min(max(v, low), high)
            level = sum(abs(edge - other) < 0.015 * (high - low) for other in placed)
            lift = 0.15 * ((level + 1) // 2) * (-1) ** level  # equal values stand above and below each other
            placed.append(edge)
            mark = "x" if diverged else style.marker if edge == v else ("<" if v < low else ">")
            edged = (1.6, colour) if diverged else (0.6, SURFACE)
            axes.plot([edge], [i + lift], mark, color=colour, ms=6, mew=edged[0], mec=edged[1], clip_on=False, zorder=4)
        if any(v < low or v > high for v in [*(v for v, _ in row.dots), *finite([row.low, row.mean, row.high])]):
            outside.append(row.name)
    if not rows:
        axes.text(0.5, 0.5, "nothing to compare yet", transform=axes.transAxes, ha="center", va="center", color=MUTED)
    if differences:
        axes.axvline(0.0, color=INK, lw=1.1, zorder=1.5)
    axes.set(xlim=(low, high), ylim=(max(1, len(rows)) - 0.5, -0.85), yticks=[])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    sign = "+" if differences else ""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if abs(v) < 1e-12 else typographic(f"{v:{sign}g}")))
    if not spread:
        axes.set_xticks([])
    minus = f" minus {shorten(results['baseline'], 24)}" if differences else ""
    axes.set_xlabel(f"test {metric_name(results)}{minus}")
    better = axes.annotate(
        "better →" if higher else "← better", (1.0 if higher else 0.0, 1.0), xycoords="axes fraction", color=MUTED
    )
    better.set(position=(0, 3), anncoords="offset points", ha="right" if higher else "left", va="bottom", fontsize=10.5)
    return outside
