"""Engines: the same trial wherever it runs; a dying process is a result, a mistake is an error with its traceback."""

import importlib.util
import os
import signal

import pytest

from gradwise.bench import engines
from gradwise.bench.recipe import Budget
from gradwise.bench.results import without_timings
from gradwise.bench.sentence import Sentence, Word
from gradwise.bench.trial import run_trial
from gradwise.core.errors import UserError

TASK = """
import os, signal
from dataclasses import replace
from gradwise.bench import tasks

def task():
    base = tasks.load("wine")
    def objective(model, batch):
        {act}
        return base.objective(model, batch)
    return replace(base, objective=objective)
"""


def job(task="wine", seed=0):
    return {
        "task": task,
        "sentence": Sentence(Word("sgd")),
        "hyper": {"lr": 0.1},
        "seed": seed,
        "budget": Budget(kind="steps", amount=20),
    }


def drained(engine, jobs):
    try:
        for key, work in jobs.items():
            engine.submit(key, work)
        return dict(engine.finished() for _ in jobs)
    finally:
        engine.close()


EXPECTED = {seed: without_timings(run_trial(**job(seed=seed))) for seed in range(3)}


def test_the_inline_engine_gives_the_numbers_of_the_bare_function():
    assert without_timings(drained(engines.InlineEngine(), {seed: job(seed=seed) for seed in EXPECTED})) == EXPECTED


def test_spawned_processes_give_the_same_numbers_and_may_die(tmp_path):
    """One task kills its process each time it is tried, as the kernel does when memory runs out, another only the first time."""
    tries, mark = tmp_path / "tries", tmp_path / "mark"
    deadly, once = tmp_path / "deadly.py", tmp_path / "once.py"
    deadly.write_text(TASK.format(act=f"open({str(tries)!r}, 'a').write('x') and os.kill(os.getpid(), signal.SIGKILL)"))
    once.write_text(
        TASK.format(
            act=f"os.path.exists({str(mark)!r}) or (open({str(mark)!r}, 'w').close(), os.kill(os.getpid(), signal.SIGKILL))"
        )
    )
    jobs = {"deadly": job(f"{deadly}:task"), "once": job(f"{once}:task")} | {seed: job(seed=seed) for seed in EXPECTED}
    found = drained(engines.LocalEngine(2), jobs)
    lost = found.pop("deadly")
    assert lost["status"] == "diverged"
    assert lost["reason"].startswith(f"the process running it died twice (exit code {-signal.SIGKILL}")
    assert tries.exists()
    assert without_timings(found.pop("once")) == EXPECTED[0]
    assert without_timings(found) == EXPECTED


def test_a_bug_in_a_task_is_an_error_with_its_traceback(tmp_path):
    path = tmp_path / "buggy.py"
    mark = tmp_path / "calls"
    path.write_text(TASK.format(act=f"open({str(mark)!r}, 'a').write('x'); os.path.getsize({str(mark)!r}) < 5 or {{}}['missing']"))
    with pytest.raises(engines.TrialFailed, match=r"(?s)^sgd seed 0: KeyError: 'missing'.*buggy\.py"):
        drained(engines.InlineEngine(), {("sgd", "seed", 0): job(f"{path}:task")})


def test_a_worker_that_is_asked_to_end_stops_the_comparison_and_is_no_result(tmp_path):
    """So it is when a machine shuts down; what was measured is kept by the caller."""
    path = tmp_path / "ended.py"
    path.write_text(TASK.format(act="os.kill(os.getpid(), signal.SIGTERM)"))
    with pytest.raises(UserError, match="a worker was ended by SIGTERM: what was measured is kept"):
        drained(engines.LocalEngine(1), {"ended": job(f"{path}:task")})


def test_a_task_that_ends_its_process_is_a_mistake():
    assert engines._attempted({})[0] == "failure"
    leaving = dict(job(), task="wine", hyper={"lr": 0.1})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engines, "run_trial", lambda **_: (_ for _ in ()).throw(SystemExit(3)))
        assert engines._attempted(leaving)[1].startswith("SystemExit: 3")


def test_workers_end_when_their_parent_is_killed(tmp_path):
    import subprocess
    import sys
    import time

    code = "from gradwise.bench.engines import LocalEngine; import time\nif __name__ == '__main__':\n e = LocalEngine(2); " \
        "print(*[w.process.pid for w in e._workers], flush=True); time.sleep(60)"  # fmt: skip
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    for _ in range(600):
        if not any(_alive(pid) for pid in pids):
            break
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_unknown_engine_and_a_missing_extra_are_one_clear_line(monkeypatch):
    with pytest.raises(UserError, match="unknown engine 'rey'; did you mean 'ray'"):
        engines.make("rey", 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--engine ray needs Ray: pip install 'gradwise\[ray\]'"):
        engines.make("ray", 1)
