"""The door: exit codes and messages of `gradwise compare` and `gradwise new-task`, as a user meets them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradwise as package
from gradwise import cli

RECIPE = (
    'task = "wine"\nseeds = 2\ntrials = 1\nbudget = {steps = 5}\n[methods.a]\noptimizer = "adamw"\n[methods.b]\noptimizer = "sgd"\n'
)


def gradwise(*words, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "gradwise", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=240
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(autouse=True)
def _absolute_path(monkeypatch):
    """The subprocess runs elsewhere: a relative PYTHONPATH must still lead to the sources."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(package.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("COLUMNS", "200")


def test_a_comparison_from_flags_writes_its_folder_and_the_report_where_asked(tmp_path):
    code, out, err = gradwise(
        "compare", "--task", "wine", "--methods", "adamw,sgd", "--seeds", 2, "--trials", 1, "--budget", "steps=5",
        "--report", "report.html",
        "--workers", 1, cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "report: report.html" in out
    page = (tmp_path / "report.html").read_text()
    assert "gradwise compare --task wine --methods adamw,sgd --seeds 2 --trials 1 --budget steps=5 --report report.html" in page
    assert (tmp_path / "runs" / "wine" / "results.json").exists()
    assert "Traceback" not in err


def test_a_comparison_from_a_recipe(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    code, out, err = gradwise("compare", "--recipe", "recipe.toml", "--out", "here", "--workers", 1, cwd=tmp_path)
    assert code == 0, err
    assert "On wine" in out
    assert (tmp_path / "here" / "report.html").exists()
    code, _, err = gradwise("compare", "--recipe", "recipe.toml", "--out", "here", "--trials", 2, cwd=tmp_path)
    assert code == 2
    assert "trials is 1 there and 2 here" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--task", "digitz", "--methods", "adamw,sgd"], "unknown task 'digitz'; did you mean 'digits'"),
        (["--task", "wine", "--methods", "adamw,adabelif"], "unknown method 'adabelif'; did you mean 'adabelief'"),
        (["--task", "wine", "--methods", "adamw,sgd", "--budget", "step=3"], "unknown budget 'step'; did you mean 'steps'"),
        (["--task", "wine", "--methods", "adamw,sgd", "--seeds", "few"], "--seeds: expected a number of seeds"),
        (["--task", "wine", "--methods", "adamw,sgd", "--baseline", "sdg"], "unknown method 'sdg'; did you mean 'sgd'"),
        (["--task", "wine", "--methods", "adamw,sgd", "--engine", "rai"], "unknown engine 'rai'; did you mean 'ray'"),
        (["--task", "none.py:task", "--methods", "adamw,sgd"], "there is no file none.py"),
        (["--recipe", "none.toml"], "there is no file none.toml"),
        (["--task", "wine"], "--methods is needed"),
        (["--trials", "many"], "--trials"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradwise", "compare", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_the_template_printed_by_new_task_runs(tmp_path):
    code, template, _ = gradwise("new-task", cwd=tmp_path)
    assert code == 0
    (tmp_path / "my_task.py").write_text(template)
    words = [
        "--task",
        "my_task.py:task",
        "--methods",
        "adam,sgd",
        "--seeds",
        2,
        "--trials",
        1,
        "--budget",
        "steps=5",
        "--workers",
        1,
    ]
    code, out, err = gradwise("compare", *words, cwd=tmp_path)
    assert code == 0, err
    assert "On spirals" in out
    assert (tmp_path / "runs" / "my_task" / "report.html").exists()


def test_the_door_itself_is_light():
    """Help and mistakes in words come at once: the libraries that measure are imported by the commands that need them."""
    code = (
        "import sys; from gradwise import cli; print(sorted({'torch', 'numpy', 'sklearn', 'optuna', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
