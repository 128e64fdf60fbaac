"""Charts show the numbers that they are given: means, intervals, every seed, every trial, every divergence."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from scipy import stats

from gradwise.bench import plots
from gradwise.bench.chart_style import DARK, LIGHT, drawing, method_styles, tukey_fence
from gradwise.bench.seed_rows import Row, difference_rows, draw_rows, ranked, value_rows

_spec = importlib.util.spec_from_file_location("synthetic", Path(__file__).with_name("test_report.py"))
assert _spec is not None
assert _spec.loader is not None
synthetic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return synthetic.synthetic_results(partly_diverged=("adamp",), diverged=("sgdp",))


def curves(results: dict[str, Any], quantity: str, abscissa: str = "step", close_up: bool = False) -> tuple[Axes, Any]:
    with drawing(420, 285) as figure:
        axes = figure.add_subplot()
        return axes, plots._draw_curves(axes, results, quantity, abscissa, close_up)


def lines(axes: Axes, results: dict[str, Any], name: str) -> list[Any]:
    colour = LIGHT[method_styles(results)[name].colour]
    return [line for line in axes.get_lines() if to_hex(line.get_color()) == colour and len(line.get_xdata()) > 0]


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Björn Ottosson's OKLab of linear sRGB."""
    to_cone = [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.68069955, 0.10739696], [0.08830246, 0.28171884, 0.6299787]]
    to_lab = [[0.21045426, 0.79361779, -0.00407205], [1.9779985, -2.42859221, 0.45059371], [0.02590404, 0.78277177, -0.80867577]]
    return np.array(to_lab) @ np.cbrt(np.array(to_cone) @ rgb.clip(0, 1))


VISION = {  # Machado, Oliveira and Fernandes 2009, severity 1.0
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_any_two_colours_differ_for_everyone(palette: tuple[str, ...], vision: str) -> None:
    seen = [oklab(np.array(VISION[vision]) @ linear(c)) for c in palette]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.09


@pytest.mark.parametrize(("palette", "page"), [(LIGHT, "#ffffff"), (DARK, "#171b21")], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(palette: tuple[str, ...], page: str) -> None:
    luminance = [float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (*palette, page)]
    assert all((max(v, luminance[-1]) + 0.05) / (min(v, luminance[-1]) + 0.05) >= 3 for v in luminance[:-1])


def test_twelve_methods_look_different_and_the_baseline_is_neutral() -> None:
    results = {"baseline": "m3", "methods": [{"name": f"m{i}"} for i in range(12)]}
    styles = method_styles(results)
    assert len({(s.colour, str(s.dash)) for s in styles.values()}) == 12
    assert len({s.marker for s in styles.values()}) == 12
    assert [n for n, s in styles.items() if s.colour == 0] == ["m3"]


def test_line_is_the_mean_and_band_is_students_interval(results: dict[str, Any]) -> None:
    axes, _ = curves(results, "validation")
    lion = next(m for m in results["methods"] if m["name"] == "lion")
    values = np.array([r["curve"]["validation"] for r in lion["runs"]])
    (line,) = lines(axes, results, "lion")
    np.testing.assert_allclose(line.get_ydata(), values.mean(0), rtol=1e-12)
    half = stats.t.ppf(0.975, 4) * values.std(0, ddof=1) / np.sqrt(5)
    corners = np.concatenate([p.vertices for c in axes.collections for p in c.get_paths()])
    for expected in np.concatenate([values.mean(0) - half, values.mean(0) + half]):
        assert np.abs(corners[:, 1] - expected).min() < 1e-9


def test_training_loss_is_averaged_in_its_logarithm(results: dict[str, Any]) -> None:
    axes, _ = curves(results, "train_loss")
    runs = next(m["runs"] for m in results["methods"] if m["name"] == "sgd")
    (line,) = lines(axes, results, "sgd")
    np.testing.assert_allclose(line.get_ydata(), stats.gmean([r["curve"]["train_loss"] for r in runs], axis=0), rtol=1e-9)
    assert axes.get_yscale() == "log"


def test_seeds_that_diverged_are_crosses_and_not_in_the_mean(results: dict[str, Any]) -> None:
    axes, (ends, _) = curves(results, "validation")
    runs = {m["name"]: m["runs"] for m in results["methods"]}
    done = [r["curve"]["validation"][-1] for r in runs["adamp"] if r["status"] == "complete"]
    assert len(done) == 4
    assert ends["adamp"] == pytest.approx(np.mean(done))
    assert sum(line.get_marker() == "x" for line in lines(axes, results, "adamp")) == 1
    assert sum(line.get_marker() == "x" for line in lines(axes, results, "sgdp")) == 5
    assert "sgdp" not in ends


def test_seeds_measured_at_different_times_are_interpolated() -> None:
    results = synthetic.synthetic_results(("adamw",), seeds=2, trials=1)
    for run, stretch in zip(results["methods"][0]["runs"], (1.0, 1.3), strict=True):
        run["curve"]["seconds"] = [stretch * s for s in run["curve"]["step"]]
        run["curve"]["validation"] = [2 * x for x in run["curve"]["seconds"]]
    axes, _ = curves(results, "validation", "seconds")
    x, y = (np.asarray(v) for v in lines(axes, results, "adamw")[0].get_data())
    np.testing.assert_allclose(y, 2 * x)
    assert (x.min(), x.max()) == (13.0, 300.0)


def test_one_bad_method_does_not_set_the_range_of_the_close_up() -> None:
    spoiled = synthetic.synthetic_results()
    for run in spoiled["methods"][5]["runs"]:
        run["curve"]["validation"] = [0.1] * 30
    axes, (_, outside) = curves(spoiled, "validation", close_up=True)
    assert outside == ["sgd"]
    assert axes.get_ylim()[0] > 0.5
    assert plots.learning_curve(spoiled, "validation", close_up=True).caption == "Outside this range: sgd."


def test_every_tuning_trial_is_a_point_and_the_chosen_one_has_a_ring(results: dict[str, Any]) -> None:
    for index, method in enumerate(results["methods"]):
        with drawing(300, 205) as figure:
            axes = figure.add_subplot()
            plots._draw_sensitivity(axes, results, index)
        own = lines(axes, results, method["name"])
        shown = {(float(v.get_xdata()[0]), float(v.get_ydata()[0])) for v in own if v.get_marker() != "x"}
        trials = {(t["hyper"]["lr"], t["validation"]) for t in method["tuning"] if t["status"] == "complete"}
        assert shown == trials
        assert sum(v.get_marker() == "x" for v in own) == sum(t["status"] == "diverged" for t in method["tuning"])
        rings = [float(v.get_xdata()[0]) for v in axes.get_lines() if v.get_markerfacecolor() == "none"]
        assert rings == ([method["chosen"]["lr"]] if method["chosen"] else [])


def test_dots_are_differences_on_the_same_seed_whatever_the_order_of_runs() -> None:
    shuffled = synthetic.synthetic_results(("adamw", "lion"), seeds=4, trials=1)
    test = {m["name"]: {r["seed"]: r["test"] for r in m["runs"]} for m in shuffled["methods"]}
    shuffled["methods"][0]["runs"].reverse()
    (base, row) = difference_rows(shuffled)
    assert (base.name, base.mean) == ("adamw", 0.0)
    np.testing.assert_allclose([v for v, _ in row.dots], [test["lion"][s] - test["adamw"][s] for s in range(4)], atol=1e-15)


def test_diverged_seeds_stand_where_the_statistics_put_them() -> None:
    results = synthetic.synthetic_results(("adamw", "lion"), seeds=3, trials=1, partly_diverged=("lion",))
    test = {m["name"]: [r["test"] for r in m["runs"]] for m in results["methods"]}
    worst = min(v for own in test.values() for v in own if v is not None)
    assert value_rows(results)[1].dots[1] == (worst, True)
    assert difference_rows(results)[1].dots[1] == (worst - test["adamw"][1], True)


def test_equal_values_do_not_hide_each_other(results: dict[str, Any]) -> None:
    with drawing(420, 300) as figure:
        axes = figure.add_subplot()
        draw_rows(axes, results, [Row("lion", [(0.95, False)] * 4 + [(0.9, False)], None, None, None)], differences=False)
    places = {(float(v.get_xdata()[0]), float(v.get_ydata()[0])) for v in lines(axes, results, "lion")}
    assert len(places) == 5
    assert all(abs(y) < 0.5 for _, y in places)


@pytest.mark.parametrize("differences", [True, False])
def test_every_seed_is_a_dot_and_what_leaves_the_range_is_named(results: dict[str, Any], differences: bool) -> None:
    rows = ranked(results, difference_rows(results) if differences else value_rows(results))
    with drawing(420, 300) as figure:
        axes = figure.add_subplot()
        outside = draw_rows(axes, results, rows, differences=differences)
    low, high = axes.get_xlim()
    for row in rows:
        dots = [v for v in lines(axes, results, row.name) if len(v.get_xdata()) == 1 and v.get_marker() not in ("|", None)]
        assert len(dots) == len(row.dots)
        assert all(low <= float(v.get_xdata()[0]) <= high for v in dots)
        assert sum(v.get_marker() == "x" for v in dots) == sum(diverged for _, diverged in row.dots)
    fence = tukey_fence([r.mean for r in rows if r.mean is not None])
    assert {r.name for r in rows if r.mean is not None and not fence[0] <= r.mean <= fence[1]} <= set(outside)


def test_svg_has_only_colours_that_follow_the_page_and_text_that_stays_text(results: dict[str, Any]) -> None:
    charts = [
        plots.learning_curve(results, "validation"),
        plots.learning_rate_sensitivity(results, "lion"),
        plots.paired_differences(results),
        plots.seed_values(results),
    ]
    for chart in charts:
        assert not re.search(r"(?:fill|stroke): #", chart.svg)
        assert "http" not in chart.svg
        assert "<text" in chart.svg
    identifiers = [set(re.findall(r' id="([^"]+)"', chart.svg)) for chart in charts]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(identifiers, 2))


@pytest.mark.parametrize(("quantity", "over"), [("accuracy", None), ("validation", "hours")])
def test_unknown_quantities_are_named(results: dict[str, Any], quantity: str, over: str | None) -> None:
    with pytest.raises(ValueError, match=quantity if over is None else over):
        plots.learning_curve(results, quantity, over=over)
    with pytest.raises(KeyError, match="adam"):
        plots.learning_rate_sensitivity(results, "adam")


@pytest.mark.parametrize("methods", [("adamw",), synthetic.TWELVE], ids=["one", "twelve"])
def test_the_picture_is_written_as_png_and_as_svg(methods: tuple[str, ...], tmp_path: Path) -> None:
    results = synthetic.synthetic_results(methods, seeds=2, trials=1)
    plots.save_plot(results, tmp_path / "plot.png")
    plots.save_plot(results, tmp_path / "plot.svg")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1
