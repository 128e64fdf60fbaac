"""`gradwise reproduce` on a package of toy claims: choosing, keeping, a real kill -9 in the middle, damage, and the table."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from gradwise import papers
from gradwise.bench.claim import Verdict
from gradwise.bench.reproduce import RawNumbers, choose, claims_in, discover, reproduce, write_table
from gradwise.core.errors import UserError

TOY = '''
import time
from pathlib import Path
from gradwise.bench.claim import Claim

FOLDER = Path(__file__).parent

class Larger(Claim):
    paper, statement, published = "toy", "One | is more than [nothing].", "1 against 0"
    metric, better, needs = "amount", "higher", "nothing"

    def measure(self, seed):
        with (FOLDER / "log").open("a") as f:
            f.write(f"{type(self).__name__} {seed}\\n")
        while seed == 2 and (FOLDER / "wait").exists():
            time.sleep(0.01)
        return {"method": 1.0 + 0.1 * seed, "baseline": 0.01 * seed}

class Smaller(Larger):
    statement, better = "One is less than nothing.", "lower"
'''

_serial = itertools.count()


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """A fresh package of claims with two rooms: shed (toy, other) and attic (big)."""
    root = tmp_path / f"toyclaims{next(_serial)}"
    other = TOY.replace('"toy"', '"other"')
    for room, files in {"shed": {"toy": TOY, "other": other, "_shared": ""}, "attic": {"big": BIG}}.items():
        (root / room).mkdir(parents=True)
        (root / room / "__init__.py").touch()
        for name, text in files.items():
            (root / room / f"{name}.py").write_text(text)
    (root / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return root


BIG = '''
from gradwise.bench.claim import Claim

class Huge(Claim):
    paper, statement, published = "big", "Scale is all.", "90.1 %"
    metric, better, needs = "accuracy", "higher", "a cluster"
    not_measurable = "needs 1,024 accelerators"
'''


def run(toys, ids=(), **choice):
    return reproduce(ids, package=toys.name, folder=toys.parent / "verdicts", console=Console(quiet=True), **choice)


def logged(toys, room="shed"):
    return (toys / room / "log").read_text().split("\n")[:-1]


def test_claims_are_found_without_importing_them(toys):
    found = discover(toys.name)
    assert {id: file.room for id, file in found.items()} == {"big": "attic", "other": "shed", "toy": "shed"}
    assert f"{toys.name}.shed.toy" not in sys.modules
    assert [type(claim).__name__ for claim in claims_in(found["toy"])] == ["Larger", "Smaller"]


def test_choosing_by_id_room_and_all(toys):
    assert [f.id for f in choose(["toy", "big", "toy"], package=toys.name)] == ["toy", "big"]
    assert [f.id for f in choose(room="shed", package=toys.name)] == ["other", "toy"]
    assert [f.id for f in choose(["toy"], room="attic", package=toys.name)] == ["toy", "big"]
    assert [f.id for f in choose(everything=True, package=toys.name)] == ["big", "other", "toy"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"ids": ["tooy"]}, "unknown claim 'tooy'; did you mean 'toy'"),
        ({"room": "shad"}, "unknown room 'shad'; did you mean 'shed'"),
        ({}, "name at least one paper, a --room or --all .papers with claims: big, other, toy"),
    ],
)
def test_what_is_not_there_is_a_users_mistake_with_the_nearest_names(toys, asked, said):
    with pytest.raises(UserError, match=said):
        choose(**asked, package=toys.name)


def test_every_claim_of_a_file_gets_its_verdict_and_all_are_kept(toys):
    outcome = run(toys, everything=True)
    assert [(v.paper, v.claim, v.verdict) for v in outcome.verdicts] == [
        ("big", "Huge", "not measurable at this scale"),
        ("other", "Larger", "reproduced"),
        ("other", "Smaller", "contradicted"),
        ("toy", "Larger", "reproduced"),
        ("toy", "Smaller", "contradicted"),
    ]
    kept = [Verdict.from_json(row) for row in papers.read_verdicts(outcome.folder / "toy.json")]
    assert kept == outcome.verdicts[3:]
    assert outcome.broken == {}
    assert not (outcome.folder / "partial").exists()
    assert json.loads(json.dumps(outcome.to_json()))["claims"][3]["measurements"][1] == {
        **outcome.verdicts[3].to_json()["measurements"][1], "method": 1.1, "baseline": 0.01,
    }  # fmt: skip


def test_a_completed_run_is_measured_anew_the_next_time(toys):
    run(toys, ["toy"])
    run(toys, ["toy"])
    assert logged(toys) == [f"{name} {seed}" for name in ("Larger", "Smaller") for seed in range(5)] * 2


def interrupt(toys):
    """Start a run, kill it with SIGKILL while Larger's seed 2 is being measured, and let that seed pass from then on."""
    (toys / "shed" / "wait").touch()
    call = (
        "from pathlib import Path; from gradwise.bench.reproduce import reproduce; "
        f"reproduce(['toy'], package={toys.name!r}, folder=Path('verdicts'))"
    )
    source = Path(papers.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(toys.parent)])}
    log = toys / "shed" / "log"
    with subprocess.Popen([sys.executable, "-c", call], cwd=toys.parent, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (log.exists() and "Larger 2" in log.read_text()):
            time.sleep(0.02)
        process.kill()
    (toys / "shed" / "wait").unlink()
    assert process.returncode == -9


def test_after_kill_9_the_same_command_goes_on_and_ends_with_the_same_numbers(toys):
    interrupt(toys)
    outcome = run(toys, ["toy"])
    larger = [f"Larger {seed}" for seed in (0, 1, 2, 2, 3, 4)]
    assert logged(toys) == larger + [f"Smaller {seed}" for seed in range(5)]
    uninterrupted = run(toys, ["toy"])

    def numbers(o):
        return [(v.verdict, v.difference, v.low, v.high, v.p, [(m.method, m.baseline) for m in v.measurements]) for v in o.verdicts]

    assert numbers(outcome) == numbers(uninterrupted)


def test_numbers_of_another_text_are_measured_again(toys):
    interrupt(toys)
    path = toys / "shed" / "toy.py"
    path.write_text(path.read_text().replace("1.0 +", "2.0 +"))
    outcome = run(toys, ["toy"])
    assert [m.method for m in outcome.verdicts[0].measurements] == pytest.approx([2.0, 2.1, 2.2, 2.3, 2.4])


def test_a_file_edited_during_the_run_makes_the_verdict_stale(toys):
    path = toys / "shed" / "toy.py"
    edits = f"(FOLDER / 'toy.py').write_text({TOY + '# edited'!r})"
    path.write_text(TOY.replace("        while seed == 2", f"        {edits}\n        while seed == 2"))
    outcome = run(toys, ["toy"])
    assert path.read_text().endswith("# edited")
    assert outcome.table.read_text().count("stale") == 2


def test_a_torn_line_is_said_and_kept_aside(toys):
    interrupt(toys)
    partial = toys.parent / "verdicts" / "partial" / "toy.jsonl"
    whole = partial.read_text()
    partial.write_text(whole[: len(whole) - 20])
    console = Console(record=True, width=300, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    outcome = reproduce(["toy"], package=toys.name, folder=toys.parent / "verdicts", console=console)
    assert "toy.jsonl: 1 unreadable line(s)" in console.export_text()
    assert partial.with_suffix(".damaged").read_text().startswith('{"key"')
    assert logged(toys)[3] == "Larger 1"
    assert len(outcome.verdicts) == 2


def test_a_broken_claim_costs_the_others_nothing_and_leaves_its_last_verdict(toys):
    before = run(toys, ["toy"])
    (toys / "shed" / "other.py").write_text("import no_such_extra\n")
    path = toys / "shed" / "toy.py"
    fields = "    statement, better ="
    path.write_text(path.read_text().replace(fields, f"    def measure(self, seed):\n        return {{}}\n{fields}"))
    sys.modules.pop(f"{toys.name}.shed.toy")
    outcome = run(toys, everything=True)
    assert outcome.broken.keys() == {"other", "toy.Smaller"}
    assert "no_such_extra" in outcome.broken["other"]
    assert "seed 0" in outcome.broken["toy.Smaller"]
    assert {v.paper for v in outcome.verdicts} == {"toy", "big"}
    assert [Verdict.from_json(r) for r in papers.read_verdicts(outcome.folder / "toy.json")] == before.verdicts


def test_a_claim_of_another_paper_is_refused(toys):
    (toys / "shed" / "other.py").write_text(TOY)
    with pytest.raises(TypeError, match="paper must be the file's name, 'other', got 'toy'"):
        claims_in(discover(toys.name)["other"])
    (toys / "shed" / "other.py").write_text("")
    sys.modules.pop(f"{toys.name}.shed.other")
    with pytest.raises(TypeError, match="defines no public subclass of Claim"):
        claims_in(discover(toys.name)["other"])


def test_the_table_holds_every_kept_verdict_and_says_what_is_stale(toys):
    run(toys, ["big"])
    outcome = run(toys, ["toy"])
    text = outcome.table.read_text()
    assert "3 claims: 1 reproduced, 1 contradicted, 1 not measurable at this scale." in text
    row = next(line for line in text.splitlines() if "**reproduced**" in line)
    measured = "amount: 1.2 against 0.02 (5 seeds, higher is better)"
    assert row.startswith(f"| toy | One \\| is more than [nothing]. | 1 against 0 | {measured} |")
    verdict = outcome.verdicts[0]
    assert f"{verdict.difference:+.3g} [{verdict.low:+.3g}, {verdict.high:+.3g}]" in row
    assert verdict.created[:10] in row
    assert verdict.environment["torch"] in row
    assert "needs 1,024 accelerators" in text
    assert "stale" not in text
    (toys / "shed" / "toy.py").write_text("# changed\n")
    write_table(outcome.folder, outcome.table, package=toys.name)
    assert outcome.table.read_text().count("stale") == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2, "claims": []}', '{"schema": 1, "claims": [{"claim": "x"}]}'])
def test_a_damaged_verdict_file_is_named_and_not_overwritten(toys, text):
    outcome = run(toys, ["big"])
    damaged = outcome.folder / "toy.json"
    damaged.write_text(text)
    with pytest.raises(UserError, match=r"toy.json is not a file of verdicts .* run `gradwise reproduce toy` again"):
        write_table(outcome.folder, outcome.table, package=toys.name)
    assert damaged.read_text() == text


def test_a_verdict_without_its_numbers_is_damaged_too(toys):
    outcome = run(toys, ["toy"])
    record = json.loads((outcome.folder / "toy.json").read_text())
    del record["claims"][0]["measurements"]
    (outcome.folder / "toy.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"toy.json: not a verdict: 'measurements'"):
        write_table(outcome.folder, outcome.table, package=toys.name)


def test_a_folder_that_cannot_be_written_is_a_users_mistake(toys):
    (toys.parent / "verdicts").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot write"):
        run(toys, ["toy"])
    assert not (toys / "shed" / "log").exists()  # said before the first seed, not after the last


def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_is_there(toys, monkeypatch):
    kept = []

    def append(self, claim, measurement):
        if len(kept) == 3:
            raise UserError("cannot write toy.jsonl: No space left on device")
        kept.append(measurement)

    monkeypatch.setattr(RawNumbers, "append", append)
    with pytest.raises(UserError, match="No space left"):
        run(toys, ["toy"])
    assert len(kept) == 3
