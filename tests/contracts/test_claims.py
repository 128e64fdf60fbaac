"""What every claim file must be, and what every kept verdict must rest on, over all there are: there is no exemption list."""

import inspect
from pathlib import Path

import pytest

from gradwise import papers
from gradwise.bench.claim import VERDICTS, Claim, Verdict, pass_verdict, text_hash
from gradwise.bench.reproduce import claims_in, discover, write_table
from gradwise.bench.statistics import paired_bootstrap

FILES = discover()
CLAIMS = [claim for file in FILES.values() for claim in claims_in(file)]
SHIPPED = Path(papers.__file__).parent / "claims" / "verdicts"
VERDICTS_KEPT = [Verdict.from_json(record) for path in sorted(SHIPPED.glob("*.json")) for record in papers.read_verdicts(path)]

every_claim = pytest.mark.parametrize("claim", CLAIMS, ids=[claim.label() for claim in CLAIMS])
every_verdict = pytest.mark.parametrize("verdict", VERDICTS_KEPT, ids=[f"{v.paper}.{v.claim}" for v in VERDICTS_KEPT])


def test_every_paper_has_a_claim_file_and_every_claim_file_a_paper():
    catalog = {entry.id: entry for entry in papers.catalog()}
    assert FILES.keys() == catalog.keys()
    for id, file in FILES.items():
        assert file.room == catalog[id].room
        assert file.module == catalog[id].claim


@every_claim
def test_it_says_everything_in_words_a_reader_can_judge(claim):
    assert len(claim.statement.split()) >= 4
    assert claim.statement.endswith(".")
    assert claim.published.strip()
    assert claim.metric.strip()
    assert len(claim.needs.split()) >= 2


@every_claim
def test_its_measure_takes_a_seed_and_it_has_at_least_two(claim):
    if claim.not_measurable:
        assert type(claim).measure is Claim.measure
        return
    assert list(inspect.signature(claim.measure).parameters) == ["seed"]
    assert len(set(claim.seeds)) == len(claim.seeds) >= 2


@pytest.mark.parametrize("file", FILES.values(), ids=list(FILES))
def test_names_within_a_file_are_distinct_and_its_module_says_what_it_claims(file):
    claims = claims_in(file)
    assert len({claim.label() for claim in claims}) == len(claims)
    assert len((inspect.getmodule(type(claims[0])).__doc__ or "").split()) >= 5


def test_every_claim_has_a_verdict_and_every_verdict_a_claim():
    assert {f"{v.paper}.{v.claim}" for v in VERDICTS_KEPT} == {claim.label() for claim in CLAIMS}  # else: gradwise reproduce ID


@every_verdict
def test_a_kept_verdict_is_what_the_framework_makes_of_its_raw_numbers(verdict):
    assert verdict.verdict in VERDICTS
    if not verdict.measurements:
        assert verdict.verdict == "not measurable at this scale"
        assert verdict.reason
        return
    again = paired_bootstrap([m.method for m in verdict.measurements], [m.baseline for m in verdict.measurements])
    expected = (again.difference, again.low, again.high, again.p)
    assert (verdict.difference, verdict.low, verdict.high, verdict.p) == pytest.approx(expected)
    rule = {"better": verdict.better, "expects": verdict.expects, "tolerance": verdict.tolerance}
    assert verdict.verdict == pass_verdict(verdict.low, verdict.high, **rule)


@every_verdict
def test_a_current_verdict_has_the_words_and_all_the_seeds_of_its_claim(verdict):
    claims = {claim.label(): claim for claim in CLAIMS}
    current = verdict.paper in FILES and text_hash(FILES[verdict.paper].path) == verdict.source
    if not current:  # CLAIMS.md calls it stale
        return
    claim = claims[f"{verdict.paper}.{verdict.claim}"]
    assert verdict.seeds == (() if claim.not_measurable else tuple(claim.seeds))
    for name in ("statement", "published", "metric", "better", "expects", "tolerance", "needs"):
        assert getattr(verdict, name) == getattr(claim, name), name


def test_the_table_is_the_one_these_verdicts_give(tmp_path):
    root = papers.checkout()
    if root is None:
        pytest.skip("no source checkout: CLAIMS.md is not installed")
    write_table(SHIPPED, tmp_path / "CLAIMS.md")
    assert (root / "CLAIMS.md").read_text(encoding="utf-8") == (tmp_path / "CLAIMS.md").read_text(encoding="utf-8")
