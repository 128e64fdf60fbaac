"""The claims machinery: what a claim must say, who passes the verdict, and what is kept."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwise.bench.claim import VERDICTS, Claim, Measurement, Verdict, pass_verdict, run_claim, source_hash


def define(_name="Toy", **changes):
    """A claim class with every field, but for the changes; a field set to None is left out."""
    fields = {
        "paper": "toy", "statement": "More is more.", "published": "no single figure", "metric": "amount", "better": "higher",
        "needs": "nothing", "measure": lambda self, seed: {"method": 1.0 + 0.1 * seed, "baseline": 0.2 * seed},
    }  # fmt: skip
    fields = {name: value for name, value in {**fields, **changes}.items() if value is not None}
    return type(_name, (Claim,), fields)


@pytest.mark.parametrize("name", ["paper", "statement", "published", "metric", "better", "needs"])
def test_a_missing_field_is_named_when_the_class_is_defined(name):
    with pytest.raises(TypeError, match=f"claim Toy: attribute '{name}' must be .*, got nothing"):
        define(**{name: None})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"statement": "  "}, "'statement' must be a non-empty str, got '  '"),
        ({"better": "up"}, "'better' must be \"higher\" or \"lower\", got 'up'"),
        ({"expects": "equality"}, "'expects' must be one of .*, got 'equality'"),
        ({"expects": "parity"}, "'tolerance' must be above 0"),
        ({"tolerance": 0.1}, "'tolerance' must be 0 where expects = \"difference\", got 0.1"),
        ({"expects": "parity", "tolerance": math.nan}, "'tolerance' must be a finite number >= 0, got nan"),
        ({"seeds": (3,)}, r"'seeds' must be at least 2 distinct int, got \(3,\)"),
        ({"seeds": (3, 3)}, "'seeds' must be at least 2 distinct int"),
        ({"seeds": 5}, "'seeds' must be a sequence of int, got 5"),
        ({"seeds": (0, 1.5)}, "'seeds' must be a sequence of int"),
        ({"measure": None}, "Toy needs either measure"),
        ({"not_measurable": "needs a cluster"}, "Toy has both measure"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(changes, said):
    with pytest.raises(TypeError, match=said):
        define(**changes)


def test_a_shared_base_needs_no_fields_but_its_subclasses_do():
    class Shared(Claim, abstract=True):
        paper, better = "toy", "lower"

    assert Shared.paper == "toy"
    with pytest.raises(TypeError, match="claim Half: attribute 'statement'"):
        type("Half", (Shared,), {"measure": lambda self, seed: {}})


@pytest.mark.parametrize(
    ("interval", "rule", "verdict"),
    [
        ((0.1, 0.3), {"better": "higher"}, "reproduced"),
        ((-0.3, -0.1), {"better": "higher"}, "contradicted"),
        ((-0.1, 0.3), {"better": "higher"}, "no detectable difference"),
        ((0.0, 0.0), {"better": "higher"}, "no detectable difference"),
        ((-0.3, -0.1), {"better": "lower"}, "reproduced"),
        ((0.1, 0.3), {"better": "lower"}, "contradicted"),
        ((-0.01, 0.01), {"better": "lower", "expects": "parity", "tolerance": 0.02}, "reproduced"),
        ((0.03, 0.05), {"better": "lower", "expects": "parity", "tolerance": 0.02}, "contradicted"),
        ((-0.05, -0.03), {"better": "lower", "expects": "parity", "tolerance": 0.02}, "contradicted"),
        ((-0.01, 0.05), {"better": "lower", "expects": "parity", "tolerance": 0.02}, "no detectable difference"),
        ((-0.01, 0.5), {"better": "higher", "expects": "not worse", "tolerance": 0.02}, "reproduced"),
        ((-0.5, -0.03), {"better": "higher", "expects": "not worse", "tolerance": 0.02}, "contradicted"),
        ((-0.5, 0.5), {"better": "higher", "expects": "not worse", "tolerance": 0.02}, "no detectable difference"),
        ((-0.5, 0.01), {"better": "lower", "expects": "not worse", "tolerance": 0.02}, "reproduced"),
        ((0.03, 0.5), {"better": "lower", "expects": "not worse", "tolerance": 0.02}, "contradicted"),
    ],
)
def test_the_rule_of_the_verdict(interval, rule, verdict):
    assert pass_verdict(*interval, **rule) == verdict


@given(st.floats(-1, 1), st.floats(0, 1), st.sampled_from(["difference", "parity", "not worse"]), st.floats(0.01, 0.5))
def test_turning_the_metric_around_turns_no_verdict(low, width, expects, tolerance):
    high = low + width
    there = pass_verdict(low, high, better="higher", expects=expects, tolerance=tolerance)
    assert pass_verdict(-high, -low, better="lower", expects=expects, tolerance=tolerance) == there


@pytest.mark.parametrize(
    ("method", "better", "verdict"),
    [
        ([1.0, 1.1, 1.05, 1.2, 1.12], "higher", "reproduced"),
        ([1.0, 1.1, 1.05, 1.2, 1.12], "lower", "contradicted"),
        ([0.9, -1.1, 1.05, -1.2, 0.12], "higher", "no detectable difference"),
        ([0.0] * 5, "higher", "no detectable difference"),
    ],
)
def test_the_framework_passes_the_verdict_from_the_raw_numbers(method, better, verdict):
    claim = define(better=better, measure=lambda self, seed: {"method": method[seed], "baseline": 0.0})()
    result = run_claim(claim)
    assert result.verdict == verdict
    assert [m.method for m in result.measurements] == method
    assert result.seeds == (0, 1, 2, 3, 4)
    assert result.low <= result.difference <= result.high


def test_what_cannot_be_measured_is_not_measured_and_says_why():
    result = run_claim(define(measure=None, not_measurable="needs 1,024 accelerators for a month")())
    assert result.verdict == VERDICTS[3] == "not measurable at this scale"
    assert result.reason == "needs 1,024 accelerators for a month"
    assert result.measurements == ()
    assert result.difference is result.low is result.p is result.method_mean is None


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"method": 1.0}, r"seed 0: measure must return .* keys \"method\" and \"baseline\", got keys \['method'\]"),
        ({"method": 1.0, "baseline": 1.0, "extra": 1.0}, "got keys .*extra"),
        ((1.0, 2.0), "got tuple"),
        (None, "got NoneType"),
        ({"method": math.nan, "baseline": 1.0}, "toy.Toy, seed 0: measure must return finite numbers, got method = nan"),
        ({"method": 1.0, "baseline": math.inf}, "got baseline = inf"),
        ({"method": 1.0, "baseline": "high"}, "got baseline = 'high'"),
    ],
)
def test_a_wrong_measurement_names_claim_seed_and_key(returned, said):
    with pytest.raises(ValueError, match=said):
        run_claim(define(measure=lambda self, seed: returned)())


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match=r"toy.Toy needs at least 2 distinct seeds, got \[1, 1\]"):
        run_claim(define()(), seeds=[1, 1])


def test_kept_seeds_are_not_measured_again_and_progress_sees_the_others():
    measured, seen = [], []
    claim = define(measure=lambda self, seed: (measured.append(seed), {"method": 1.0, "baseline": seed})[1])()
    kept = [Measurement(1, 5.0, 4.0, 0.5), Measurement(99, 0.0, 0.0, 0.1)]
    result = run_claim(claim, progress=seen.append, kept=kept)
    assert measured == [0, 2, 3, 4]
    assert [m.seed for m in seen] == measured
    assert result.measurements[1] == kept[0]
    assert result.seeds == (0, 1, 2, 3, 4)


def test_a_verdict_survives_json_and_says_what_it_rests_on():
    verdict = run_claim(define()())
    text = json.dumps(verdict.to_json(), allow_nan=False)
    assert Verdict.from_json(json.loads(text)) == verdict
    assert {"gradwise", "torch", "python", "processor", "threads"} <= verdict.environment.keys()
    assert all(m.seconds >= 0 for m in verdict.measurements)
    with pytest.raises(ValueError, match=r"not a verdict: .*statement"):
        Verdict.from_json({k: v for k, v in verdict.to_json().items() if k != "statement"})


def test_the_hash_follows_the_text_of_the_file_and_of_the_private_files_beside_it(tmp_path, monkeypatch):
    (tmp_path / "hashed_claim.py").write_text("from gradwise.bench.claim import Claim\nclass Base(Claim, abstract=True): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import hashed_claim

    first = source_hash(hashed_claim.Base)
    assert source_hash(hashed_claim.Base) == first
    (tmp_path / "_shared.py").write_text("x = 1\n")
    second = source_hash(hashed_claim.Base)
    (tmp_path / "hashed_claim.py").write_text("# changed\n")
    assert len({first, second, source_hash(hashed_claim.Base)}) == 3
