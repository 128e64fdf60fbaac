"""Tuning: a pure function of the history, inside its ranges, the same for an interrupted comparison as for a whole one."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwise.bench import tuning
from gradwise.core.search_space import Choice, LogUniform, Uniform

SPACE = {"lr": LogUniform(1e-4, 1.0), "momentum": Uniform(0.0, 0.9), "kind": Choice(("a", None, True, 3))}


def trial(hyper, validation, curve=None):
    return {"hyper": hyper, "validation": validation, "curve": {"validation": curve or [validation]}, "cost": {"steps": 10}}


def played(count, score, better="higher", trials=None):
    history = []
    for _ in range(count):
        hyper = tuning.suggest(SPACE, history, better=better, method="m", trials=trials or count)
        history.append(trial(hyper, score(hyper)))
    return history


def test_suggestions_survive_a_round_trip_through_json():
    """What a resumed comparison reads back leads to the same next point, to the bit."""
    history = played(9, lambda h: -abs(math.log10(h["lr"]) + 2))
    read_back = json.loads(json.dumps(history))
    assert tuning.suggest(SPACE, read_back, better="higher", method="m", trials=9) == tuning.suggest(
        SPACE, history, better="higher", method="m", trials=9
    )


def test_methods_and_trial_numbers_have_seeds_of_their_own():
    first = [tuning.suggest(SPACE, [], better="higher", method=name, trials=12)["lr"] for name in ("a", "b")]
    assert first[0] != first[1]
    rates = [t["hyper"]["lr"] for t in played(6, lambda h: 0.0, trials=12)]
    assert len(set(rates)) == 6


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_sampler_learns_the_right_direction(better):
    sign = -1 if better == "higher" else 1
    history = played(30, lambda h: sign * abs(math.log10(h["lr"]) + 2), better)
    late = [abs(math.log10(t["hyper"]["lr"]) + 2) for t in history[15:]]
    early = [abs(math.log10(t["hyper"]["lr"]) + 2) for t in history[:10]]
    assert sum(late) / len(late) < sum(early) / len(early)


def test_diverged_trials_count_as_the_worst_and_nothing_breaks_when_all_did():
    history = played(30, lambda h: None if h["lr"] > 1e-2 else -abs(math.log10(h["lr"]) + 3))
    assert sum(t["validation"] is None for t in history[15:]) < sum(t["validation"] is None for t in history[:15])
    all_lost = played(12, lambda h: None)
    assert set(tuning.suggest(SPACE, all_lost, better="lower", method="m", trials=13)) == set(SPACE)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=8), st.sampled_from(["higher", "lower"]))
def test_every_suggestion_lies_in_its_space(scores, better):
    history = []
    for score in scores:
        history.append(trial(tuning.suggest(SPACE, history, better=better, method="m", trials=8), score))
    for t in history:
        assert 1e-4 <= t["hyper"]["lr"] <= 1.0
        assert 0.0 <= t["hyper"]["momentum"] <= 0.9
        assert t["hyper"]["kind"] in ("a", None, True, 3)


def test_the_best_is_the_best_final_validation_then_the_faster_then_the_earlier():
    a, b, c, d = (
        trial({"lr": lr}, v, curve)
        for lr, v, curve in ((1, 0.8, [0.1, 0.8]), (2, 0.9, [0.1, 0.9]), (3, 0.9, [0.5, 0.9]), (4, None, [0.1]))
    )
    assert tuning.best([a, b, c, d], "higher") == {"lr": 3}
    assert tuning.best([a, b, b | {"hyper": {"lr": 9}}], "higher") == {"lr": 2}
    assert tuning.best([a, b, c, d], "lower") == {"lr": 1}
    assert tuning.best([d, d | {"cost": {"steps": 99}, "hyper": {"lr": 7}}], "lower") == {"lr": 7}
    with pytest.raises(ValueError, match="no trial"):
        tuning.best([], "lower")
