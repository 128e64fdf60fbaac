"""The pictures of a comparison, drawn from results.json alone: learning curves, learning-rate sensitivity, paired seeds.

A range that one bad method would stretch hides all others; ranges are therefore robust, and what lies outside is drawn at the edge
and named in the caption. A run that diverged is never dropped: it is a cross.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from gradwise.bench.chart_style import (
    INK,
    LIGHT,
    MUTED,
    SURFACE,
    Chart,
    Results,
    drawing,
    finite,
    inline,
    method_styles,
    metric_name,
    padded,
    shorten,
    tukey_fence,
    typographic,
)  # fmt: skip
from gradwise.bench.seed_rows import Row, difference_rows, draw_rows, ranked, value_rows
from gradwise.bench.statistics import mean_interval

Array = NDArray[np.float64]

_ABSCISSAE = {"step": "training step", "seconds": "seconds of training", "forwards": "forward passes", "bytes": "gradient bytes"}


def learning_curve(results: Results, quantity: str, *, over: str | None = None, close_up: bool = False) -> Chart:
    """Mean over the completed seeds with its 95 % interval as a band; a seed that diverged is a thin line that ends in a cross.

    Args:
        results: a results.json of schema 1.
        quantity: "validation" or "train_loss" (drawn on a log axis; mean and interval are then those of the logarithm).
        over: the abscissa, a key of a curve: "step", "seconds", "forwards" or "bytes"; None takes what the budget counts.
        close_up: only the second half of the budget, on the range in which most methods end.

    Raises:
        ValueError: an unknown quantity or abscissa.

    Example:
        >>> empty = {"task": {"metric": "accuracy", "better": "higher"}, "budget": {"kind": "steps"}, "methods": []}
        >>> learning_curve(empty, "validation").title
        'Validation accuracy by training step'
    """
    abscissa = over or _budget_abscissa(results)
    if quantity not in ("validation", "train_loss") or abscissa not in _ABSCISSAE:
        raise ValueError(
            f'quantity must be "validation" or "train_loss" and over one of {list(_ABSCISSAE)}, got {quantity!r}, {over!r}'
        )
    what = f"Validation {metric_name(results)}" if quantity == "validation" else "Training loss"
    title = f"{what}, the second half" if close_up else f"{what} by {_ABSCISSAE[abscissa]}"
    with drawing(420, 285) as figure:
        ends, outside = _draw_curves(figure.add_subplot(), results, quantity, abscissa, close_up)
        told = "; ".join(f"{name} ends at {value:.3g}" for name, value in ends.items())
        caption = f"Outside this range: {', '.join(outside)}." if outside else ""
        return Chart(title, inline(figure, title, told or "No finished run.", f"{quantity}-{abscissa}-{int(close_up)}"), caption)


def learning_rate_sensitivity(results: Results, method: str) -> Chart:
    """Every tuning trial of one method as a point, validation over learning rate; the other methods' trials lie behind it in grey.

    A ring marks the trial that was chosen; a cross at the worse edge of the panel is a trial that diverged.

    Raises:
        KeyError: the method is not in the results.

    Example:
        >>> empty = {"task": {"metric": "R2", "better": "higher"}, "methods": [{"name": "sgd", "chosen": {}, "tuning": []}]}
        >>> learning_rate_sensitivity(empty, "sgd").title
        'sgd'
    """
    index = {m["name"]: i for i, m in enumerate(results["methods"])}[method]
    with drawing(300, 205) as figure:
        told = _draw_sensitivity(figure.add_subplot(), results, index)
        return Chart(method, inline(figure, f"Validation by learning rate, {method}", told, f"lr-{index}"))


def paired_differences(results: Results) -> Chart:
    """One dot a seed: the method's test metric minus the baseline's on the same seed, with the mean and its 95 % interval.

    Example:
        >>> empty = {"task": {"metric": "R2", "better": "higher"}, "methods": [], "comparisons": [], "baseline": "sgd"}
        >>> paired_differences(empty).title
        'Difference to sgd, seed by seed'
    """
    return _row_chart(results, f"Difference to {results['baseline']}, seed by seed", difference_rows(results), differences=True)


def seed_values(results: Results) -> Chart:
    """One dot a seed: the test metric of every run, with each method's mean and its 95 % interval.

    Example:
        >>> seed_values({"task": {"metric": "R2", "better": "higher"}, "methods": [], "baseline": "sgd"}).title
        'Test R2, seed by seed'
    """
    return _row_chart(results, f"Test {metric_name(results)}, seed by seed", value_rows(results), differences=False)


def save_plot(results: Results, path: str | Path) -> None:
    """Write the one picture of a comparison, learning curves beside paired differences, as PNG or SVG by the path's suffix.

    Raises:
        ValueError: the suffix is neither .png nor .svg.

    Example:
        >>> save_plot({}, "picture.gif")
        Traceback (most recent call last):
        ValueError: path must end in .png or .svg, got 'picture.gif'
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"path must end in .png or .svg, got {path.name!r}")
    rows = ranked(results, difference_rows(results)) or ranked(results, value_rows(results))
    with drawing(1000, max(380, 90 + 40 * len(rows))) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        _draw_curves(left, results, "validation", _budget_abscissa(results), close_up=False)
        for name, style in method_styles(results).items():
            left.plot([], [], color=LIGHT[style.colour], marker=style.marker, ls=style.dash, ms=5, label=shorten(name, 28))
        left.legend(
            frameon=False, ncols=2, fontsize=11, loc="lower right" if results["task"]["better"] == "higher" else "upper right"
        )
        differences = bool(results["comparisons"])
        draw_rows(right, results, rows, differences=differences)
        title = (
            f"Difference to {results['baseline']}, seed by seed" if differences else f"Test {metric_name(results)}, seed by seed"
        )
        for axes, words in ((left, f"{results['task']['name']}: validation {metric_name(results)}"), (right, title)):
            axes.set_title(words, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=18)
        figure.savefig(path, dpi=144, metadata={"Date": None} if path.suffix == ".svg" else None)


def _budget_abscissa(results: Results) -> str:
    kind = str(results["budget"]["kind"])
    return "step" if kind == "steps" else kind


def _row_chart(results: Results, title: str, rows: Sequence[Row], *, differences: bool) -> Chart:
    best_first, sign = ranked(results, rows), "+" if differences else ""
    with drawing(420, 74 + 35 * max(1, len(rows))) as figure:
        outside = draw_rows(figure.add_subplot(), results, best_first, differences=differences)
        told = "; ".join(f"{r.name}: " + ("no value" if r.mean is None else f"mean {r.mean:{sign}.3g}") for r in best_first)
        caption = f"Partly outside this range: {', '.join(outside)}." if outside else ""
        return Chart(title, inline(figure, title, told, "paired" if differences else "seeds"), caption)


def _draw_curves(axes: Axes, results: Results, quantity: str, abscissa: str, close_up: bool) -> tuple[dict[str, float], list[str]]:
    """Draw every method; returns where each one ends and the names that end outside the range shown."""
    styles, loss = method_styles(results), quantity == "train_loss"
    shown: dict[str, tuple[Array, Array]] = {}
    broken: list[tuple[Array, Array]] = []
    bands: dict[str, Array] = {}
    shade = min(0.14, 0.6 / max(1, len(results["methods"])))  # many bands over each other must not hide the lines
    for i, method in enumerate(results["methods"]):
        style = styles[method["name"]]
        colour, order = LIGHT[style.colour], 4 + (style.colour == 0)
        x, values = _aligned([r for r in method["runs"] if r["status"] == "complete"], abscissa, quantity)
        if len(x):
            mean, low, high = _interval(values, loss)
            if len(values) > 1:
                axes.fill_between(x, low, high, color=colour, alpha=shade, lw=0, zorder=2)
                bands[method["name"]] = np.concatenate([low[-1 - len(x) // 8 :], high[-1 - len(x) // 8 :]])
            every = max(1, len(x) // 5)  # about five markers a line, each line's at other places
            axes.plot(x, mean, color=colour, ls=style.dash, marker=style.marker, ms=5.5, mec=SURFACE, mew=0.7,
                      markevery=(i * every // 4 % every, every), zorder=order)  # fmt: skip
            shown[method["name"]] = (x, mean)
        for run in method["runs"]:
            x, y = _curve(run, abscissa, quantity)
            if run["status"] != "complete" and len(x):
                axes.plot(x, y, color=colour, lw=0.9, alpha=0.7, zorder=order)
                axes.plot(x[-1:], y[-1:], "x", color=colour, ms=7, mew=1.8, zorder=order + 1)
                broken.append((x, y))
    ends = {name: float(y[-1]) for name, (x, y) in shown.items()}
    if not shown:
        axes.set_title("every run diverged" if broken else "no run yet", loc="right", fontsize=10.5, color=MUTED, pad=2)
    last = max((float(x[-1]) for x, _ in shown.values() or broken), default=1.0)
    fence = tukey_fence(list(ends.values())) if close_up else (-np.inf, np.inf)
    start = last / 2 if close_up else 0.0
    pooled = [float(v) for n, (x, y) in shown.items() if fence[0] <= ends[n] <= fence[1] for v in y[x >= 1.5 * start]]
    pooled = pooled or [float(v) for _, y in broken for v in y]
    if close_up:
        pooled += [float(v) for n, band in bands.items() if fence[0] <= ends[n] <= fence[1] for v in band]
    target = results.get("target")
    if target is not None and not loss:
        axes.axhline(target, color=MUTED, lw=1, ls=(0, (2, 2)), zorder=1.5)
        pooled += [target] if pooled else []
    log = loss or (results["task"]["better"] == "lower" and _wide_range(pooled))
    bottom, top = _limits(axes, pooled, log=log, robust=not close_up)
    axes.set_xlim(start, (last if shown else 1.03 * last) or 1.0)  # room for the crosses at the end of broken curves
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if abscissa == "bytes":
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_xlabel(_ABSCISSAE[abscissa])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: typographic(f"{v:.6g}")))
    return ends, [name for name, value in ends.items() if not bottom <= value <= top]


def _draw_sensitivity(axes: Axes, results: Results, index: int) -> str:
    better = results["task"]["better"]
    trials = [[t for t in m["tuning"] if (t["hyper"].get("lr") or 0) > 0] for m in results["methods"]]
    pooled = [v for own in trials for v in finite(t["validation"] for t in own if t["status"] == "complete")]
    low, high = _limits(axes, pooled, log=better == "lower" and _wide_range(pooled), robust=True)
    method = results["methods"][index]
    style = method_styles(results)[method["name"]]
    colour, worse = LIGHT[style.colour], low if better == "higher" else high
    for i in sorted(range(len(trials)), key=lambda i: i == index):  # its own trials last, above the others'
        for t in trials[i]:
            fine = t["status"] == "complete" and t["validation"] is not None
            y = min(max(t["validation"], low), high) if fine else worse
            if i != index:
                axes.plot([t["hyper"]["lr"]], [y], "o", color=MUTED, ms=3, mew=0, alpha=0.25 if fine else 0.0, zorder=2)
                continue
            if fine and t["hyper"] == method["chosen"]:
                axes.plot([t["hyper"]["lr"]], [y], "o", ms=13, mfc="none", mec=INK, mew=1.3, zorder=5, clip_on=False)
            axes.plot([t["hyper"]["lr"]], [y], style.marker if fine else "x", color=colour, ms=6.5, mec=SURFACE if fine else colour,
                      mew=0.7 if fine else 1.8, zorder=4, clip_on=False)  # fmt: skip
    own, rates = trials[index], [t["hyper"]["lr"] for group in trials for t in group]
    axes.set_xscale("log")
    if rates:
        axes.set_xlim(min(rates) / 1.6, max(rates) * 1.6)
    if not own:
        axes.text(0.5, 0.5, "no learning rate was tuned", transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: typographic(f"{v:g}")))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: typographic(f"{v:.6g}")))
    if pooled and axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("learning rate", fontsize=10.5)
    bad = sum(t["status"] != "complete" for t in own)
    return f"{len(own)} trials, {bad} diverged; chosen learning rate {method['chosen'].get('lr') if method['chosen'] else None}."


def _aligned(runs: Sequence[Mapping[str, Any]], abscissa: str, quantity: str) -> tuple[Array, Array]:
    """Curves of several seeds on one abscissa, (points,) and (seeds, points); interpolated where the seeds' points differ."""
    curves = [c for c in (_curve(r, abscissa, quantity) for r in runs) if len(c[0])]
    if not curves:
        return np.empty(0), np.empty((0, 0))
    first = curves[0][0]
    if all(len(x) == len(first) and np.allclose(x, first) for x, _ in curves):
        return first, np.stack([y for _, y in curves])
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), max(2, min(len(x) for x, _ in curves)))
    return grid, np.stack([np.interp(grid, x, y) for x, y in curves])


def _curve(run: Mapping[str, Any], abscissa: str, quantity: str) -> tuple[Array, Array]:
    x, y = (np.array([np.nan if v is None else v for v in run["curve"][k]], dtype=np.float64) for k in (abscissa, quantity))
    there = np.isfinite(x) & np.isfinite(y)
    return x[there], y[there]


def _interval(values: Array, log: bool) -> tuple[Array, Array, Array]:
    """Mean over seeds and its 95 % interval at every point; of the logarithm, brought back, when `log`."""
    intervals = [mean_interval(list(column)) for column in (np.log(np.maximum(values, 1e-12)) if log else values).T]
    mean, low, high = (np.array([getattr(t, k) for t in intervals]) for k in ("mean", "low", "high"))
    return (np.exp(mean), np.exp(low), np.exp(high)) if log else (mean, low, high)


def _limits(axes: Axes, values: Sequence[float], *, log: bool, robust: bool) -> tuple[float, float]:
    """Set the y range and return it; on a log axis if asked, possible and worth it (a factor of 3 or more)."""
    log = log and bool(values) and 0 < 3 * min(values) < max(values)
    v: Array = np.log10(values) if log else np.asarray(values, dtype=np.float64)
    if robust and len(v):
        q10, q90 = np.quantile(v, [0.1, 0.9])
        v = v.clip(q10 - 3 * (q90 - q10), q90 + 3 * (q90 - q10))
    low, high = padded(list(v), 0.05)
    if log:
        low, high = 10.0**low, 10.0**high
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(low, high)
    if not values:
        axes.set_yticks([])
    return low, high


def _wide_range(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) > 30 * min(values)
