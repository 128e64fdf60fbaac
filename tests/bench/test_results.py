"""From trials to results: summaries against numbers worked out by hand, and a verdict that says no more than it knows."""

import pytest

from gradwise.bench import recipe, results, statistics, tasks

TASK = tasks.load("wine")  # accuracy, higher is better


def run(seed, test, validation=(0.2, 0.5, 0.9), status="complete"):
    steps = list(range(0, 10 * len(validation), 10))
    curve = {
        "step": steps,
        "seconds": [s / 100 for s in steps],
        "forwards": steps,
        "bytes": steps,
        "train_loss": [1.0] * len(steps),
    }
    cost = {"steps": 20, "seconds": 0.2, "forwards": 20, "backwards": 20, "gradient_bytes": 400, "peak_bytes": 77, "state_bytes": 8}
    diverged = status == "diverged"
    return {
        "number": seed, "seed": seed, "hyper": {"lr": 0.1}, "status": status, "reason": "nan" if diverged else None,
        "curve": curve | {"validation": list(validation)}, "validation": None if diverged else validation[-1],
        "test": test, "cost": cost,
    }  # fmt: skip


def found(tests, seeds=5, trials=1):
    """Results of a comparison in which each method's test figures are given, None being a diverged run."""
    asked = recipe.parse({"task": "wine", "methods": list(tests), "seeds": seeds, "trials": trials})
    tuned = {name: [run(0, None)] * trials for name in tests}
    runs = {
        name: [run(s, v, status="complete" if v is not None else "diverged") for s, v in enumerate(vs)]
        for name, vs in tests.items()
    }
    return results.results(asked, TASK, tuned, runs, command="gradwise compare")


BASE = [0.90, 0.91, 0.92, 0.93, 0.94]


def test_a_summary_is_the_mean_with_students_interval_and_costs():
    summary = found({"adamw": BASE, "sgd": BASE})["methods"][0]["summary"]
    expected = statistics.mean_interval(BASE)
    assert (summary["mean"], summary["low"], summary["high"]) == (expected.mean, expected.low, expected.high)
    assert summary["best_at_budget"] == pytest.approx(0.9)
    assert summary["seconds_per_step"] == pytest.approx(0.01)
    assert (summary["peak_bytes"], summary["state_bytes"], summary["gradient_bytes_per_step"]) == (77, 8, 20)
    assert summary["diverged"] == 0


def test_the_target_is_the_baselines_median_and_time_to_it_the_first_point_that_reaches_it():
    asked = recipe.parse({"task": "wine", "methods": ["adamw", "sgd"], "seeds": 3, "trials": 1})
    runs = {
        "adamw": [run(0, 0.9, (0.1, 0.3, 0.6)), run(1, 0.9, (0.1, 0.3, 0.7)), run(2, 0.9, (0.1, 0.3, 0.8))],
        "sgd": [run(0, 0.9, (0.1, 0.7, 0.2)), run(1, 0.9, (0.1, 0.2, 0.3, 0.9)), run(2, 0.9, (0.1, 0.2))],
    }
    told = results.results(asked, TASK, {"adamw": [run(0, None)], "sgd": [run(0, None)]}, runs)
    assert told["target"] == 0.7
    assert told["methods"][0]["summary"]["steps_to_target"] == 20  # 20, 20 and never: the first run ends at 0.6
    assert told["methods"][1]["summary"]["steps_to_target"] == 30  # 10, 30, never
    assert told["methods"][1]["summary"]["seconds_to_target"] == pytest.approx(0.3)


def test_a_target_that_most_seeds_never_reach_has_no_time():
    asked = recipe.parse({"task": "wine", "methods": ["adamw", "sgd"], "seeds": 3, "trials": 1})
    runs = {"adamw": [run(s, 0.9) for s in range(3)], "sgd": [run(s, 0.1, (0.1, 0.2)) for s in range(3)]}
    assert results.results(asked, TASK, {}, runs)["methods"][1]["summary"]["steps_to_target"] is None


def test_a_clear_difference_is_told_and_corrected():
    better = [b + 0.03 + 0.001 * i for i, b in enumerate(BASE)]
    told = found({"adamw": BASE, "lion": better, "sgd": BASE[::-1]})
    first, second = told["comparisons"]
    assert (first["method"], first["verdict"]) == ("lion", "better")
    assert first["difference"] == pytest.approx(0.032)
    expected = statistics.holm([statistics.paired_bootstrap(x, BASE).p for x in (better, BASE[::-1])])
    assert [first["p_holm"], second["p_holm"]] == expected
    assert second["verdict"] == "no detectable difference"
    assert "lion (0.952) beats adamw (0.92, 95 % interval" in told["verdict"]
    assert "no detectable difference for sgd" in told["verdict"]
    assert "5 paired seeds, after 1 tuning trial each and 300 steps a run" in told["verdict"]


def test_no_difference_is_told_in_those_words():
    told = found({"adamw": BASE, "sgd": BASE, "lion": [b - 0.2 - 0.001 * i for i, b in enumerate(BASE)]})
    assert "no detectable difference in test accuracy between adamw (0.92, 95 % interval" in told["verdict"]
    assert told["verdict"].endswith("and sgd over 5 paired seeds, after 1 tuning trial each and 300 steps a run; lion is worse.")
    alone = found({"adamw": BASE, "lion": [b - 0.2 - 0.001 * i for i, b in enumerate(BASE)]})
    assert "adamw (0.92, 95 % interval" in alone["verdict"]
    assert "is best in test accuracy" in alone["verdict"]


@pytest.mark.parametrize(("seeds", "verdict"), [(2, "no detectable difference"), (5, "no detectable difference"), (6, "better")])
def test_the_same_difference_on_every_seed_is_judged_by_its_signs_alone(seeds, verdict):
    base = [0.9] * seeds
    (told,) = found({"adamw": base, "sgd": [x + 1 / 35 for x in base]}, seeds=seeds)["comparisons"]
    assert told["p"] == pytest.approx(2.0 ** (1 - seeds))
    assert told["verdict"] == verdict


def test_few_seeds_are_said_to_be_few():
    assert "fewer than 5 seeds can hardly detect" in found({"adamw": BASE[:3], "sgd": BASE[:3]}, seeds=3)["verdict"]
    assert "fewer than 5 seeds" not in found({"adamw": BASE, "sgd": BASE})["verdict"]


def test_diverging_never_helps():
    """A run that diverged counts as the worst figure of the table, here that of the untrained model (0.2), and is counted."""
    told = found({"adamw": BASE, "sgd": [0.99, 0.99, None, None, None], "lion": [0.5, 0.6, 0.7, 0.8, 0.9]})
    sgd = told["methods"][1]["summary"]
    assert sgd["diverged"] == 3
    assert sgd["mean"] == pytest.approx((0.99 + 0.99 + 3 * 0.2) / 5)
    assert told["comparisons"][0]["difference"] == pytest.approx((0.09 + 0.08 + (0.2 * 3 - 0.92 - 0.93 - 0.94)) / 5)
    assert "; sgd diverged on 3 of 5 seeds" in told["verdict"]


def test_diverging_hurts_even_where_nobody_else_does_badly():
    """Every completed run has the same figure: the worst of them would make a method that always diverges a perfect match."""
    told = found({"adamw": [0.95] * 5, "sgd": [None] * 5})
    assert told["comparisons"][0]["difference"] == pytest.approx(0.2 - 0.95)
    assert told["comparisons"][0]["verdict"] == "worse"


def test_numbers_near_zero_have_no_sign():
    assert "(0, 95 % interval 0 to 0) is best" in found({"adamw": [-0.0] * 5, "sgd": [None] * 5})["verdict"].replace("-0", "minus")


def test_methods_that_always_diverge():
    lost = [None] * 5
    told = found({"adamw": BASE, "sgd": lost})
    assert told["methods"][1]["summary"]["mean"] is None
    assert told["comparisons"][0]["verdict"] in ("worse", "no detectable difference")
    assert (
        found({"adamw": lost, "sgd": lost})["verdict"] == "On wine every run of every method diverged: there is nothing to compare."
    )
    reversed_roles = found({"adamw": lost, "sgd": BASE, "lion": [b - 0.2 for b in BASE]})["verdict"]
    assert reversed_roles.startswith("On wine, the baseline adamw diverged on every seed; the best mean test accuracy")
    assert "is that of sgd (0.92, 95 % interval" in reversed_roles
    assert found({"adamw": BASE, "sgd": lost})["verdict"].endswith("; sgd diverged on every seed.")
    assert "no detectable difference" not in found({"adamw": BASE, "sgd": lost})["verdict"]


def test_partial_results_have_the_same_shape_and_no_verdict():
    whole, partial = found({"adamw": BASE, "sgd": BASE}), found({"adamw": BASE[:3], "sgd": []})
    assert partial["partial"]
    assert not whole["partial"]
    assert partial.keys() == whole.keys()
    assert partial["methods"][1]["summary"].keys() == whole["methods"][1]["summary"].keys()
    assert partial["comparisons"] == []
    assert "not finished" in partial["verdict"]
