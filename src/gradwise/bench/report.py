"""results.json as one HTML page for people: the answer first, then all it rests on, down to every trial's raw numbers.

The page is a pure function of the results. It stands alone: style and drawings are inside it, it has no script and loads nothing,
and the results themselves travel along as a `data:` link. Nothing is judged here: numbers, intervals and verdicts are compare's.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gradwise.bench import number_format as form
from gradwise.bench import plots
from gradwise.bench.chart_style import DARK, LIGHT, Chart, Results, finite, key_glyph, method_styles, metric_name

_BUDGETS = {"steps": "training steps", "seconds": "seconds of training", "forwards": "forward passes", "bytes": "of gradients"}
_TIMES = "\N{MULTIPLICATION SIGN}"
_COSTS = (
    ("seconds_per_step", "Time a step"), ("peak_bytes", "Peak memory"), ("state_bytes", "Optimizer state"),
    ("gradient_bytes_per_step", "Gradient a step"),
)  # fmt: skip


def write_report(results: Mapping[str, Any], path: str | Path) -> None:
    """Write the report of a comparison as one self-contained HTML file.

    Args:
        results: a results.json of schema 1; partial results and nulls are shown as such. Numbers that are not finite count as null.
        path: the file to write; it is replaced whole or not at all.

    Raises:
        ValueError: results of another schema.

    Example:
        >>> write_report({"schema": 2}, "report.html")
        Traceback (most recent call last):
        ValueError: results must be of schema 1, got 2
    """
    if results.get("schema") != 1:
        raise ValueError(f"results must be of schema 1, got {results.get('schema')!r}")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradwise.bench", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": form.number,
        "bytes": form.byte_size,
        "duration": form.duration,
        "p_value": form.p_value,
        "setting": form.setting,
    }
    page = environment.get_template("report.html.jinja").render(_context(_finite_only(results)))
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _context(results: dict[str, Any]) -> dict[str, Any]:
    methods = results["methods"]
    sign = -1 if results["task"]["better"] == "higher" else 1
    ranked = sorted(methods, key=lambda m: (m["summary"].get("mean") is None, sign * (m["summary"].get("mean") or 0.0)))
    budget, target = results["budget"], results["target"]
    amount = form.byte_size(budget["amount"]) if budget["kind"] == "bytes" else form.count(budget["amount"])
    raw_places = 2 + form.decimals(finite(m["summary"].get("mean") for m in methods), [])
    return {
        "r": results,
        "metric": metric_name(results),
        "unit": str(results["task"]["metric"]).removeprefix(metric_name(results)).strip(" ()"),
        "budget": f"{amount} {_BUDGETS.get(budget['kind'], budget['kind'])}",
        "target": None if target is None else form.fixed(target, form.decimals([target], [])),
        "keys": {name: Markup(key_glyph(style)) for name, style in method_styles(results).items()},
        "light": LIGHT,
        "dark": DARK,
        "table": _table(results, ranked),
        "tally": _tally(results),
        "common": _common_words(results),
        "curves": _curves(results),
        "pairs": [*([plots.paired_differences(results)] if results["comparisons"] else []), plots.seed_values(results)],
        "sensitivity": [plots.learning_rate_sensitivity(results, m["name"]) for m in methods],
        "costs": _costs(results),
        "cost_names": [title for _, title in _COSTS],
        "knobs": {m["name"]: _knobs(m) for m in methods},
        "raw": lambda value: form.fixed(value, raw_places),
        "created": form.moment(results["created"]),
        "absent": form.ABSENT,
        "data": base64.b64encode(json.dumps(results, allow_nan=False).encode()).decode(),
    }


def _curves(results: Results) -> list[Chart]:
    return [
        plots.learning_curve(results, "validation"),
        plots.learning_curve(results, "validation", close_up=True),
        plots.learning_curve(results, "train_loss"),
        plots.learning_curve(results, "validation", over="step" if results["budget"]["kind"] == "seconds" else "seconds"),
    ]


def _table(results: Results, ranked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One dictionary of finished strings a method, and where its difference lies on the axis that the rows share."""
    compared = {c["method"]: c for c in results["comparisons"]}
    means = finite(m["summary"].get("mean") for m in ranked)
    places = form.decimals(means, _half_widths([m["summary"] for m in ranked]))
    gaps = finite(c["difference"] for c in compared.values())
    finer = [h / 10 for h in _half_widths(list(compared.values()))]  # one digit more: zero is what matters here
    fine = max(places, form.decimals([] if finer else gaps, finer))
    position = _shared_axis(list(compared.values()))
    rows = []
    for m in ranked:
        s, c = m["summary"], compared.get(m["name"])
        row = {
            "name": m["name"],
            "baseline": m["name"] == results["baseline"],
            "mean": form.fixed(s.get("mean"), places),
            "interval": form.pair(s.get("low"), s.get("high"), places),
            "difference": None,
            "glyph": None,
            "verdict": _verdict(results, m, c),
            "best": form.fixed(s.get("best_at_budget"), places),
            "steps_to_target": s.get("steps_to_target"),
            "seconds_to_target": s.get("seconds_to_target"),
            "diverged": s.get("diverged") or 0,
            "runs": len(m["runs"]),
        }
        if c and c["difference"] is not None:
            row["difference"] = form.fixed(c["difference"], fine, signed=True)
            row["spread"] = form.pair(c["low"], c["high"], fine, signed=True)
            row["p"] = c["p_holm"]
            row["glyph"] = {k: position(c[k]) for k in ("low", "difference", "high")} | {"zero": position(0.0)}
        rows.append(row)
    return rows


def _half_widths(intervals: Sequence[Mapping[str, Any]]) -> list[float]:
    ends = [(i.get("low"), i.get("high")) for i in intervals]
    return [(high - low) / 2 for low, high in ends if low is not None and high is not None]


def _verdict(results: Results, method: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """A class for the style, a sign and words for people: colour is never the only carrier."""
    runs, baseline = method["runs"], method["name"] == results["baseline"]
    if runs and all(r["status"] != "complete" for r in runs):
        return "worse", _TIMES, "the baseline diverged on every seed" if baseline else "diverged on every seed"
    if baseline:
        return "baseline", "", "the baseline"
    if comparison:
        words = comparison["verdict"]
        return words.split()[0], {"better": "▲", "worse": "▼"}.get(words, ""), words
    return "baseline", "", "not finished" if len(runs) < len(results["seeds"]) else "not compared"


def _tally(results: Results) -> list[str]:
    """How many methods are better, not detectably different and worse, in words.

    Example:
        >>> _tally({"comparisons": [{"verdict": "better"}, {"verdict": "no detectable difference"}]})
        ['1 better', '1 no detectable difference', '0 worse']
    """
    words = [c["verdict"] for c in results["comparisons"]]
    return [f"{words.count(w)} {w}" for w in ("better", "no detectable difference", "worse")] if words else []


def _common_words(results: Results) -> dict[str, Any]:
    """The words of the sentence that all methods share: said once, they leave the table to what differs.

    Example:
        >>> said = [{"sentence": {"loss": "mse", "optimizer": "sgd"}}, {"sentence": {"loss": "mse", "optimizer": "lion"}}]
        >>> _common_words({"methods": said})
        {'loss': 'mse'}
    """
    sentences = [m["sentence"] for m in results["methods"]]
    return {k: v for k, v in sentences[0].items() if all(s.get(k) == v for s in sentences)} if sentences else {}


def _costs(results: Results) -> list[dict[str, Any]]:
    """Each cost as text, as a share of the largest in its column, and as a multiple of the baseline's."""
    base: Mapping[str, Any] = next((m["summary"] for m in results["methods"] if m["name"] == results["baseline"]), {})
    styles = method_styles(results)
    largest = {k: max(finite(m["summary"].get(k) for m in results["methods"]), default=0.0) for k, _ in _COSTS}
    rows = []
    for m in results["methods"]:
        cells = []
        for k, _ in _COSTS:
            v, b = m["summary"].get(k), base.get(k)
            text = form.ABSENT if v is None else form.duration(v) if k == "seconds_per_step" else form.byte_size(v)
            ratio = (
                ("same" if v == b else f"{v / b:.2f}{_TIMES}") if v is not None and b and m["name"] != results["baseline"] else ""
            )
            cells.append({"text": text, "share": 100 * v / largest[k] if v and largest[k] else 0.0, "ratio": ratio})
        rows.append(
            {"name": m["name"], "baseline": m["name"] == results["baseline"], "colour": styles[m["name"]].colour, "cells": cells}
        )
    return rows


def _knobs(method: Mapping[str, Any]) -> list[str]:
    """Every hyper-parameter that any trial of the method names, in the order in which they first appear."""
    return list(dict.fromkeys(k for t in [*method["tuning"], *method["runs"]] for k in t["hyper"]))


def _shared_axis(comparisons: Sequence[Mapping[str, Any]]) -> Callable[[float | None], float | None]:
    """Maps a difference to 0..100; the range holds zero and every end of an interval not more than four times the typical one."""
    ends = finite(c[k] for c in comparisons for k in ("low", "difference", "high"))
    typical = sorted(map(abs, ends))[len(ends) // 2] if ends else 1.0
    kept = [0.0, *(e for e in ends if abs(e) <= 4 * typical)]
    low, width = min(kept), (max(kept) - min(kept)) or 1.0
    return lambda v: None if v is None else round(3 + 94 * max(0.0, min(1.0, (v - low) / width)), 2)


def _finite_only(value: Any) -> Any:
    """The same nest with numbers that are not finite as None.

    Example:
        >>> _finite_only({"a": [1.0, float("nan")]})
        {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {k: _finite_only(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_only(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
