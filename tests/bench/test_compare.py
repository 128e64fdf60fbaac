"""A whole comparison, small: the same numbers for any number of workers and either engine, and a folder that continues."""

import importlib.util
import io
import json

import pytest
from rich.console import Console

from gradwise.bench.compare import compare
from gradwise.bench.recipe import parse
from gradwise.bench.results import without_timings
from gradwise.bench.user_task import TEMPLATE
from gradwise.core.errors import UserError
from gradwise.core.search_space import Choice, LogUniform

ASKED = {
    "task": "wine", "seeds": [0, 3], "trials": 3, "budget": "steps=30",
    "methods": {
        "adamw": {"optimizer": "adamw"},
        "noisy": {
            "optimizer": "sgd", "loss": {"name": "comp_sum", "tau": 1.5},
            "transforms": [{"name": "clip_norm", "max_norm": 1.0}, "gradient_noise"],
        },
        "blind": {
            "optimizer": "sgd", "estimator": "spsa", "schedule": "linear_decay",
            "search_space": {"lr": {"low": 1e-3, "high": 1e-1, "log": True}},
        },
    },
}  # fmt: skip


def run(out, asked=None, **options):
    screen = io.StringIO()
    options = {"engine": "inline", "console": Console(file=screen, width=120)} | options
    found = compare(parse(asked or ASKED), out, **options)
    return found, screen.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    found, screen = run(out)
    return found, screen, out


def test_every_method_got_the_same_trials_and_seeds(whole):
    found, _, _ = whole
    for method in found["methods"]:
        assert [t["number"] for t in method["tuning"]] == [0, 1, 2]
        assert len({t["seed"] for t in method["tuning"]}) == 1
        assert [r["seed"] for r in method["runs"]] == [0, 3]
        assert all(r["hyper"] == method["chosen"] for r in method["runs"])
        assert all(t["test"] is None for t in method["tuning"])
        assert all(r["test"] is not None for r in method["runs"])


def test_what_was_tuned_lies_in_the_declared_space(whole):
    spaces = {name: method.space for name, method in parse(ASKED).methods.items()}
    for method in whole[0]["methods"]:
        for trial in method["tuning"]:
            assert trial["hyper"].keys() == spaces[method["name"]].keys()
            for knob, declared in spaces[method["name"]].items():
                value = trial["hyper"][knob]
                assert value in declared.values if isinstance(declared, Choice) else declared.low <= value <= declared.high
    assert spaces["blind"]["lr"] == LogUniform(1e-3, 1e-1)


def test_the_files_and_the_screen_tell_the_same(whole):
    found, screen, out = whole
    text = (out / "results.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == json.loads(json.dumps(found))
    assert found["verdict"] in screen
    assert "<html" in (out / "report.html").read_text()
    assert f"report: {out / 'report.html'}" in screen
    assert screen.startswith("adamw  trial 1 of 3: validation accuracy")
    for key in (
        "schema",
        "command",
        "created",
        "environment",
        "task",
        "budget",
        "seeds",
        "sampler",
        "baseline",
        "target",
        "partial",
        "comparisons",
    ):
        assert key in found
    assert found["budget"] == {"kind": "steps", "amount": 30}
    assert found["task"]["data_hash"]
    assert {m["name"]: m["paper"] for m in found["methods"]}["blind"] == "zo_bench"


def test_a_finished_folder_is_only_read(whole):
    found, _, out = whole
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/*.json")}
    again, screen = run(out)
    assert without_timings(again) == without_timings(found)
    assert "15 of 15 runs are there" in screen
    assert {path: path.stat().st_mtime_ns for path in out.glob("trials/*/*.json")} == before


def test_two_workers_give_the_same_numbers(whole, tmp_path):
    assert without_timings(run(tmp_path / "out", engine="local", workers=2)[0]) == without_timings(whole[0])


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra gradwise[ray]")
def test_ray_gives_the_same_numbers(whole, tmp_path):
    assert without_timings(run(tmp_path / "out", engine="ray", workers=2)[0]) == without_timings(whole[0])


def test_lost_and_corrupt_trials_are_measured_again_with_the_same_numbers(whole, tmp_path):
    import shutil

    found, _, out = whole
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "trials" / "noisy" / "tuning-1.json").unlink()
    victim = copy / "trials" / "blind" / "seed-3.json"
    victim.write_text(victim.read_text()[:100])
    again, screen = run(copy)
    assert without_timings(again) == without_timings(found)
    assert "seed-3.json is corrupt or truncated" in screen
    assert "continuing" in screen
    assert (copy / "corrupt" / "trials-blind-seed-3.json").exists()


def test_a_folder_of_another_command_is_refused(whole):
    _, _, out = whole
    before = (out / "results.json").read_bytes()
    with pytest.raises(UserError, match=r"budget\.steps is 30 there and 31 here"):
        run(out, ASKED | {"budget": "steps=31"})
    assert (out / "results.json").read_bytes() == before


def test_an_interrupt_while_a_trial_is_put_on_disk_waits_for_it(tmp_path, monkeypatch):
    import os
    import signal

    from gradwise.bench.store import Store

    written = []
    put = Store.put

    def interrupted(store, *words):
        os.kill(os.getpid(), signal.SIGINT)
        put(store, *words)
        written.append(words)

    monkeypatch.setattr(Store, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    assert len(written) == 1
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C means again what it meant before


def test_an_interrupt_keeps_what_there_is_and_the_rest_follows(whole, tmp_path, monkeypatch):
    from gradwise.bench.engines import InlineEngine

    finished, left = InlineEngine.finished, [7]

    def interrupted(self):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return finished(self)

    monkeypatch.setattr(InlineEngine, "finished", interrupted)
    screen = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        compare(parse(ASKED), tmp_path, engine="inline", console=Console(file=screen, width=200))
    assert "interrupted: 6 of 15 runs are kept" in screen.getvalue()
    assert "the same command continues" in screen.getvalue()
    partial = json.loads((tmp_path / "results.json").read_text())
    assert partial["partial"]
    again, said = run(tmp_path)
    assert "6 of 15 runs are there" in said
    assert without_timings(again) == without_timings(whole[0])


def test_a_users_task_is_compared_and_its_file_belongs_to_the_folder(tmp_path):
    path = tmp_path / "my_task.py"
    path.write_text(TEMPLATE)
    asked = {"task": f"{path}:task", "methods": ["adamw", "sgd"], "trials": 1, "seeds": 2, "budget": "steps=5"}
    found, _ = run(tmp_path / "out", asked)
    assert found["task"]["name"] == "spirals"
    path.write_text(TEMPLATE.replace("2, 32", "2, 33").replace("32, 2", "33, 2"))
    with pytest.raises(UserError, match="the task's file has changed since"):
        run(tmp_path / "out", asked)


def test_methods_that_diverge_are_reported_and_the_comparison_ends(tmp_path):
    asked = {"task": "diabetes", "seeds": 2, "trials": 2, "budget": "steps=30", "methods": {
        "sgd": {"optimizer": "sgd"}, "wild": {"optimizer": "sgd", "search_space": {"lr": {"low": 1e5, "high": 1e6}}},
    }}  # fmt: skip
    found, screen = run(tmp_path / "out", asked)
    wild = found["methods"][1]
    assert wild["summary"]["diverged"] == 2
    assert wild["summary"]["mean"] is None
    assert all("training loss became" in r["reason"] for r in wild["runs"])
    assert "2 of 2" in screen
    assert not found["partial"]


def test_what_cannot_stand_together_is_refused_before_anything_is_measured(tmp_path):
    asked = ASKED | {"task": "diabetes"}
    with pytest.raises(UserError, match=r"method noisy: loss comp_sum.*cannot be replaced"):
        run(tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="method adamw: one step takes 1100 bytes, the budget is 1099 bytes a run"):
        run(tmp_path / "out", ASKED | {"budget": "bytes=1099"})
    with pytest.raises(UserError, match="--report: expected a file, got the folder"):
        run(tmp_path / "out", report=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--report: .* cannot be used"):
        run(tmp_path / "out", report=tmp_path / "file" / "report.html")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--workers must be at least 1, got 0"):
        run(tmp_path / "out", workers=0)


@pytest.mark.parametrize("budget", ["forwards=40", "bytes=20000", "seconds=0.02"])
def test_other_budgets_run_to_the_end(tmp_path, budget):
    found, _ = run(tmp_path / "out", ASKED | {"budget": budget, "trials": 1})
    spent = {m["name"]: m["runs"][0]["cost"] for m in found["methods"]}
    if budget.startswith("forwards"):
        assert spent["adamw"]["steps"] == 40
        assert spent["blind"]["steps"] == 20
    elif budget.startswith("bytes"):
        assert all(0 < cost["gradient_bytes"] <= 20000 for cost in spent.values())
        assert spent["blind"]["steps"] > spent["adamw"]["steps"]
    else:
        assert all(cost["seconds"] > 0 for cost in spent.values())
