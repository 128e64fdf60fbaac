"""A comparison really killed (SIGKILL at a random trial), interrupted, run again, ends in the numbers of one that was not."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

from rich.console import Console

from gradwise.bench.compare import compare
from gradwise.bench.recipe import from_flags
from gradwise.bench.results import without_timings

RECIPE = {"task": "wine", "methods": "adamw,lion,sgd", "seeds": "3", "trials": 4, "budget": "steps=60"}
FLAGS = [*(str(part) for key, value in RECIPE.items() for part in (f"--{key}", value)), "--workers", "2"]
TOTAL = 3 * (4 + 3)


def started(out):
    words = [sys.executable, "-m", "gradwise", "compare", *FLAGS, "--out", str(out)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kept(out):
    return len(list(out.glob("trials/*/*.json")))


def wait_for(out, count, process):
    deadline = time.monotonic() + 120
    while kept(out) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def test_killed_then_interrupted_then_finished_is_as_if_nothing_had_happened(tmp_path):
    out = tmp_path / "out"
    process = started(out)
    wait_for(out, random.Random(os.getpid()).randrange(1, 8), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    survived = kept(out)
    assert 0 < survived < TOTAL

    process = started(out)
    wait_for(out, survived + 2, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert f"{survived} of {TOTAL} runs are there" in said
    assert f"{kept(out)} of {TOTAL} runs are kept in {out}; the same command continues" in said
    assert "Traceback" not in said
    assert json.loads((out / "results.json").read_text())["partial"]

    process = started(out)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    whole = compare(from_flags(**RECIPE), tmp_path / "whole", engine="inline", console=Console(file=io.StringIO()))
    assert without_timings(json.loads((out / "results.json").read_text())) == without_timings(whole)
