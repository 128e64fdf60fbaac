"""The report says what results.json says, stands alone, survives every shape of results, and lets no name or command be markup."""

from __future__ import annotations

import base64
import importlib.resources
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gradwise.bench.report import write_report

SIX = ("adamw", "adabelief", "lion", "adamp", "sgdp", "sgd")
TWELVE = (*SIX, "lion 8bit", "adamw + clip_norm(max_norm=1.0) + gradient_noise(eta=0.01)", "spsa", "refined", "nadam", "rmsprop")
EVIL = '<img src=x onerror=alert(1)>&"co\'$x_1$</script>'


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Student's interval, or nulls where one value says nothing about its spread."""
    if len(values) < 2:
        return None, None
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


class Synthesis:
    """Draws results as compare writes them: saturating curves, an optimum over the learning rate, seeds that share their luck."""

    def __init__(self, methods: Sequence[str], seeds: int, trials: int, metric: str, budget: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.methods, self.seeds, self.trials, self.metric, self.budget = methods, seeds, trials, metric, budget
        self.higher = metric in ("accuracy", "R2")
        self.luck = self.rng.normal(0, 0.004, seeds)
        self.best_rate = {name: 10 ** self.rng.uniform(-3.6, -1.2) for name in methods}
        self.skill = {name: self.rng.normal(0.968, 0.008) - 0.03 * (name == "sgd") for name in methods}
        self.speed = {name: self.rng.uniform(0.03, 0.11) for name in methods}

    def value(self, quality: float) -> float:
        return float(quality if self.higher else 4.0 * (1.02 - quality))

    def trial(
        self, name: str, number: int, seed: int, hyper: dict[str, float], chance: float, bad: bool, final: bool
    ) -> dict[str, Any]:
        off = math.log10(hyper["lr"] / self.best_rate[name])
        top = self.skill[name] + chance - 0.09 * off**2
        steps = list(range(10, 301, 10))[: 9 if bad else None]
        second = 0.004 * (1 + 0.3 * (sum(map(ord, name)) % 5)) * (1 + 0.03 * self.rng.normal())
        rates = [math.exp(-self.speed[name] * s * 10 ** -abs(off)) for s in steps]
        validation: list[float | None] = [self.value(max(0.1, top - (top - 0.1) * r + 0.003 * self.rng.normal())) for r in rates]
        validation[-1] = None if bad else validation[-1]
        return {
            "number": number,
            "seed": seed,
            "hyper": hyper,
            "status": "diverged" if bad else "complete",
            "reason": "the loss became nan at step 84" if bad else None,
            "curve": {
                "step": steps,
                "seconds": [second * s for s in steps],
                "forwards": steps,
                "bytes": [19240 * s for s in steps],
                "train_loss": [2.4 * math.exp(-self.speed[name] * s) + 0.02 + 0.002 * self.rng.random() for s in steps],
                "validation": validation,
            },
            "validation": validation[-1],
            "test": self.value(min(1.0, top - 0.004 + 0.002 * self.rng.normal())) if final and not bad else None,
            "cost": {
                "steps": steps[-1],
                "seconds": second * steps[-1],
                "forwards": steps[-1],
                "backwards": steps[-1],
                "gradient_bytes": 19240 * steps[-1],
                "peak_bytes": 412_160 + 1000 * len(name),
                "state_bytes": 19_240 if name == "sgd" else 38_480,
            },
        }

    def method(self, name: str, hopeless: bool, bad_seeds: Sequence[int], unfinished: bool) -> dict[str, Any]:
        rates = 10 ** self.rng.uniform(-5, 0, self.trials)
        hypers = [{"lr": float(lr), "weight_decay": float(10 ** self.rng.uniform(-4, -1))} for lr in rates]
        limit = 0 if hopeless else 40 * self.best_rate[name]
        tuning = [self.trial(name, i, 0, h, 0.0, h["lr"] > limit, final=False) for i, h in enumerate(hypers)]
        alive = [t for t in tuning if t["status"] == "complete"]
        sign = 1 if self.higher else -1
        chosen = max(alive, key=lambda t: sign * t["validation"])["hyper"] if alive else hypers[0]
        seeds = [] if unfinished else range(self.seeds)
        runs = [self.trial(name, s, s, chosen, self.luck[s], hopeless or s in bad_seeds, final=True) for s in seeds]
        tests = [r["test"] for r in runs if r["test"] is not None]
        low, high = interval(tests)
        reached = bool(tests) and self.rng.random() > 0.3
        per_step = [r["cost"]["seconds"] / r["cost"]["steps"] for r in runs]
        return {
            "name": name,
            "paper": name if name in ("adabelief", "lion", "adamp") else None,
            "sentence": {"loss": "cross_entropy", "estimator": "backprop", "transforms": "none", "optimizer": name},
            "search_space": {"lr": "log-uniform 1e-05 to 1", "weight_decay": "log-uniform 0.0001 to 0.1"},
            "chosen": chosen if alive else {},
            "tuning": tuning,
            "runs": runs,
            "summary": {
                "mean": float(np.mean(tests)) if tests else None,
                "low": low,
                "high": high,
                "best_at_budget": self.value(self.skill[name] + 0.003) if tests else None,
                "diverged": len(runs) - len(tests),
                "steps_to_target": float(self.rng.integers(6, 28) * 10) if reached else None,
                "seconds_to_target": float(self.rng.uniform(0.2, 1.2)) if reached else None,
                "seconds_per_step": float(np.median(per_step)) if runs else None,
                "peak_bytes": 412_160 if runs else None,
                "state_bytes": runs[0]["cost"]["state_bytes"] if runs else None,
                "gradient_bytes_per_step": 19240 if runs else None,
            },
        }

    def comparison(self, row: dict[str, Any], base: dict[str, Any], tests: int) -> dict[str, Any] | None:
        values = [(a["test"], b["test"]) for a, b in zip(row["runs"], base["runs"], strict=False)]
        gaps = [a - b for a, b in values if a is not None and b is not None]
        if len(gaps) < 2:
            return None
        low, high = interval(gaps)
        p = float(stats.ttest_1samp(gaps, 0).pvalue)
        mean, corrected = float(np.mean(gaps)), min(1.0, p * tests)
        verdict = "no detectable difference" if corrected >= 0.05 else "better" if (mean > 0) == self.higher else "worse"
        gap = {"difference": mean, "low": low, "high": high, "p": p, "p_holm": corrected}
        return {"method": row["name"], "baseline": base["name"], **gap, "verdict": verdict}


def synthetic_results(
    methods: Sequence[str] = SIX,
    *,
    seeds: int = 5,
    trials: int = 12,
    metric: str = "accuracy",
    budget: str = "steps",
    diverged: Sequence[str] = (),
    partly_diverged: Sequence[str] = (),
    partial: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Results of schema 1 for any shape of comparison; the same arguments give the same results."""
    made = Synthesis(methods, seeds, trials, metric, budget, seed)
    last = methods[-1]
    rows = [made.method(n, n in diverged, [1] if n in partly_diverged else [], partial and n == last) for n in methods]
    comparisons = [made.comparison(row, rows[0], len(rows) - 1) for row in rows[1:]]
    amount = {"steps": 300, "seconds": 2.0, "forwards": 300, "bytes": 300 * 19240}[budget]
    return {
        "schema": 1,
        "command": f"gradwise compare --task digits --methods '{','.join(methods)}' --seeds {seeds} --budget {budget}={amount}",
        "created": "2025-03-04T05:06:07+00:00",
        "verdict": f"Of {len(methods)} methods on digits none is detectably better than {methods[0]}; sgd is detectably worse.",
        "environment": {
            "gradwise": "0.1.0", "torch": "2.13.0", "python": "3.12.3", "platform": "Linux-6.1", "processor": "x86_64", "cores": 2,
            "threads": 1, "device": "cpu", "libraries": {"numpy": "2.4.6", "optuna": "5.0.0", "scikit-learn": "1.8.0"},
        },
        "task": {
            "name": "digits", "description": "8 x 8 images of handwritten digits, an MLP 64-64-10.", "metric": metric,
            "better": "higher" if made.higher else "lower", "train": 1077, "validation": 360, "test": 360, "parameters": 4810,
            "data_hash": "3f6c1d0e9b" * 6, "batch_size": 64,
        },
        "budget": {"kind": budget, "amount": amount},
        "seeds": list(range(seeds)),
        "trials": trials,
        "sampler": "TPE (optuna), seed 0",
        "baseline": methods[0],
        "target": made.value(0.955),
        "partial": partial,
        "methods": rows,
        "comparisons": [c for c in comparisons if c],
    }


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, the text of each, and whether every element is closed."""

    VOID = ("meta", "link", "br")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.stack: list[int] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in self.VOID:
            self.stack.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.stack[-1]][0] == tag, f"</{tag}> closes <{self.elements[self.stack[-1]][0]}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        for i in self.stack:
            self.elements[i][2].append(data)

    def text(self, tag: str, **attributes: str) -> list[str]:
        wanted = {k.strip("_"): v for k, v in attributes.items()}
        found = [e for e in self.elements if e[0] == tag and all(e[1].get(k) == v for k, v in wanted.items())]
        return [" ".join("".join(parts).split()) for _, _, parts in found]


def page_of(results: dict[str, Any], folder: Path) -> Page:
    write_report(results, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


SHAPES = {
    "six methods": {"partly_diverged": ("adamp",)},
    "one method, one seed": {"methods": ("adamw",), "seeds": 1, "trials": 1},
    "twelve, lower is better, seconds": {
        "methods": TWELVE,
        "metric": "root mean squared error (standard deviations of the target)",
        "budget": "seconds",
        "diverged": ("sgdp",),
    },
    "partial, bytes": {"methods": SIX[:3], "partial": True, "budget": "bytes", "metric": "R2"},
    "everything diverged": {"methods": SIX[:3], "diverged": SIX},
    "the baseline diverged, forwards": {"methods": SIX[:3], "diverged": ("adamw",), "budget": "forwards"},
    "hostile names": {"methods": ("adamw", EVIL)},
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Page]:
    results = synthetic_results(**{"trials": 4} | request.param)
    return results, page_of(results, tmp_path_factory.mktemp("report"))


def test_every_element_is_closed_and_every_identifier_is_unique(shape: tuple[dict[str, Any], Page]) -> None:
    _, page = shape
    assert page.stack == []
    names = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(names) == len(set(names))
    for reference in re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^)"]+)', page.html):
        assert set(reference.split()) <= set(names), reference


def test_nothing_is_loaded_from_outside_and_nothing_runs(shape: tuple[dict[str, Any], Page]) -> None:
    _, page = shape
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "img", "image", "base", "form", "audio", "video", "source"}
    for _, attributes, _ in page.elements:
        assert not [k for k in attributes if k.startswith("on") or k in ("src", "srcset", "action", "ping")]
        for key in ("href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:"))
    style = " ".join(page.text("style"))
    assert "@import" not in style
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page.html))
    assert "http:" not in page.html
    assert "https:" not in page.html


def test_the_page_carries_the_results_themselves(shape: tuple[dict[str, Any], Page]) -> None:
    results, page = shape
    (link,) = [a for tag, a, _ in page.elements if tag == "a" and "download" in a]
    head, _, payload = (link["href"] or "").partition(",")
    assert head == "data:application/json;base64"
    assert json.loads(base64.b64decode(payload)) == results


def test_what_was_asked_and_answered_is_said_to_the_word(shape: tuple[dict[str, Any], Page]) -> None:
    results, page = shape
    assert page.text("h1") == [results["verdict"]]
    assert page.text("pre") == [results["command"]]
    body = page.text("body")[0]
    task = results["task"]
    for words in (task["data_hash"], task["metric"], f"{task['better']} is better", "2.13.0", "1.8.0"):
        assert words in body
    assert ("Partial results." in body) == results["partial"]
    names = page.text("span", class_="name")
    assert all(" ".join(m["name"].split()) in names for m in results["methods"])


def test_every_comparison_has_its_row_and_its_verdict(shape: tuple[dict[str, Any], Page]) -> None:
    results, page = shape
    names = sorted((m["name"] for m in results["methods"]), key=len, reverse=True)
    rows = {next(n for n in names if text.startswith(f"{n} ")): text for text in results_rows(page)}
    assert rows.keys() == set(names)
    for c in results["comparisons"]:
        assert c["verdict"] in rows[c["method"]]
    for m in results["methods"]:
        assert f"{m['summary']['diverged']} of {len(m['runs'])}" in rows[m["name"]]
        if m["runs"] and m["summary"]["mean"] is None:
            assert "diverged on every seed" in rows[m["name"]]


def results_rows(page: Page) -> list[str]:
    start = next(i for i, (tag, a, _) in enumerate(page.elements) if tag == "table" and a.get("class") == "results")
    stop = next(i for i, (tag, _, _) in enumerate(page.elements) if i > start and tag == "section")
    return [" ".join("".join(t).split()) for tag, _, t in page.elements[start:stop] if tag == "tr"][1:]


def test_every_trial_has_a_row_and_every_divergence_its_reason(shape: tuple[dict[str, Any], Page]) -> None:
    results, page = shape
    trials = [t for m in results["methods"] for t in [*m["tuning"], *m["runs"]]]
    cells = [e for e in page.text("td", class_="text") if e.startswith(("complete", "diverged"))]
    assert len(cells) == len(trials)
    assert sum("the loss became nan at step 84" in c for c in cells) == sum(t["status"] == "diverged" for t in trials)
    assert sum("chosen" in c for c in cells) == sum(bool(m["chosen"]) for m in results["methods"])


def test_tables_and_drawings_speak_to_a_screen_reader(shape: tuple[dict[str, Any], Page]) -> None:
    _, page = shape
    assert all(a.get("scope") in ("col", "row") for tag, a, _ in page.elements if tag == "th")
    assert page.html.count("<caption") == page.html.count("<table")
    for tag, attributes, _ in page.elements:
        if tag == "svg":
            named = {"aria-labelledby", "aria-label"} & attributes.keys()
            assert "aria-hidden" in attributes or (attributes["role"] == "img" and named)
    assert page.html.startswith("<!DOCTYPE html>\n<html lang=")
    assert page.text("title")[0]


def test_figures_are_those_of_the_results(tmp_path: Path) -> None:
    results = synthetic_results(("adamw", "lion"), seeds=3, trials=2)
    lion = results["methods"][1]
    lion["summary"] |= {"mean": 0.97123, "low": 0.9631, "high": 0.9794, "best_at_budget": 0.98765}
    lion["summary"] |= {"steps_to_target": 120.0, "seconds_to_target": 0.4321, "diverged": 0}
    results["comparisons"] = [
        {"method": "lion", "baseline": "adamw", "difference": 0.00412, "low": -0.00123, "high": 0.00947}
        | {"p": 0.03, "p_holm": 0.0812, "verdict": "no detectable difference"}
    ]
    row = next(r for r in results_rows(page_of(results, tmp_path)) if r.startswith("lion"))
    assert row == (
        "lion 0.9710.963 to 0.979 +0.0041−0.0012 to +0.0095 0.08 no detectable difference 0.988 120 steps432 ms 0 of 3"
    )


def test_best_method_comes_first_in_the_direction_of_the_metric(tmp_path: Path) -> None:
    for metric, sign in (("accuracy", -1), ("root mean squared error", 1)):
        results = synthetic_results(SIX[-4:], metric=metric, trials=2)
        means = {m["name"]: m["summary"]["mean"] for m in results["methods"]}
        shown = [row.split()[0] for row in results_rows(page_of(results, tmp_path))]
        assert shown == sorted(means, key=lambda n: sign * means[n])


def test_same_results_give_the_same_page_and_are_left_as_they_were(tmp_path: Path) -> None:
    results = synthetic_results(SIX[:2], seeds=2, trials=3)
    before = json.dumps(results)
    pages = [page_of(results, tmp_path).html for _ in range(2)]
    assert pages[0] == pages[1]
    assert json.dumps(results) == before


def test_nan_and_infinity_are_shown_as_absent(tmp_path: Path) -> None:
    results = synthetic_results(("adamw", "lion"), seeds=3, trials=3)
    results["methods"][1]["summary"]["mean"] = math.nan
    results["methods"][1]["runs"][0]["curve"]["validation"][3] = math.inf
    page = page_of(results, tmp_path)
    assert "nan" not in " ".join(results_rows(page))
    assert page.html.count("NaN") == 0


def test_every_null_that_the_schema_allows_is_survived(tmp_path: Path) -> None:
    results = synthetic_results(("adamw", "lion"), seeds=2, trials=2)
    results["target"] = None
    for m in results["methods"]:
        m["summary"] = dict.fromkeys(m["summary"])
        m["chosen"] = None
        for t in [*m["tuning"], *m["runs"]]:
            t["cost"] = dict.fromkeys(t["cost"])
            t["validation"] = t["test"] = None
            t["curve"] = {k: [] for k in t["curve"]}
            t["hyper"] = {"momentum": 0.9}
    results["comparisons"][0] |= dict.fromkeys(("difference", "low", "high", "p", "p_holm"))
    assert len(results_rows(page_of(results, tmp_path))) == 2


def test_another_schema_is_refused_and_the_old_page_stays(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="schema 1, got 7"):
        write_report({"schema": 7}, path)
    with pytest.raises(KeyError):
        write_report({"schema": 1}, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_templates_are_part_of_the_package() -> None:
    names = {entry.name for entry in importlib.resources.files("gradwise.bench").iterdir()}
    assert {"report.html.jinja", "report.css.jinja"} <= names
