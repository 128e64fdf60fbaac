"""A user's own task file: what is wrong is named by its element, with what was expected."""

import re

import pytest

from gradwise.bench import tasks, user_task
from gradwise.core.errors import UserError


def written(tmp_path, old="", new=""):
    text = user_task.TEMPLATE
    assert old in text
    path = tmp_path / "my_task.py"
    path.write_text(text.replace(old, new) if old else text)
    return f"{path}:task"


def test_the_template_is_a_task_that_can_be_learnt(tmp_path):
    from gradwise.bench.recipe import Budget
    from gradwise.bench.sentence import Sentence, Word
    from gradwise.bench.trial import run_trial

    task = tasks.load(written(tmp_path))
    trial = run_trial(task, Sentence(Word("adam")), {"lr": 0.03}, seed=0, budget=Budget(kind="steps", amount=400))
    assert trial["validation"] > 0.9


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('better="higher"', 'better="more"', 'better: expected "higher" or "lower", got \'more\''),
        ("batch_size=32", "batch_size=0", "batch_size: expected a positive integer, got 0"),
        ("model=model,", "model=torch.nn.Linear(2, 2),", "model: expected a function that builds the model"),
        ("train=train", "train=list(train)", "train: expected a tuple of tensors"),
        ("test=test", "test=(test[0].numpy(), test[1])", "test: expected a tuple of tensors, got tuple of ndarray, Tensor"),
        ("test=test", "test=test[:1]", "expected the same number of tensors in each, got [1, 2]"),
        (
            "validation=validation",
            "validation=(validation[0], validation[1][:3])",
            "validation: expected tensors with the same first dimension",
        ),
        (
            "objective=supervised(cross_entropy)",
            "objective=lambda m, b: m(b[0])",
            "objective: expected a scalar tensor that depends on",
        ),
        (
            "objective=supervised(cross_entropy)",
            "objective=lambda m, b: b[0].sum()",
            "objective: expected a scalar tensor that depends on",
        ),
        (
            "objective=supervised(cross_entropy)",
            "objective=lambda m, b: m(b[1])",
            "objective(model, batch): expected to work, but raised",
        ),
        (
            "evaluate=accuracy",
            "evaluate=lambda m, d: 'good'",
            "evaluate: expected a finite number on the validation split, got str 'good'",
        ),
        (
            "model = seeded(lambda: ",
            "model = (lambda generator: ",
            "model: expected the same initial weights from the same generator",
        ),
        ("return Task(", "return dict(", "must return a gradwise.bench.tasks.Task, got dict"),
    ],
)
def test_a_wrong_element_is_named(tmp_path, old, new, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        tasks.load(written(tmp_path, old, new))


def test_all_wrong_values_are_told_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        tasks.load(written(tmp_path, 'metric="accuracy",', "metric=3, batch_size=-1,").replace("\n", ""))
    assert "metric: expected a string" in str(caught.value) or "repeated" in str(caught.value)
    path = tmp_path / "my_task.py"
    path.write_text(user_task.TEMPLATE.replace('metric="accuracy"', "metric=3").replace("batch_size=32", "batch_size=-1"))
    with pytest.raises(UserError) as caught:
        tasks.load(f"{path}:task")
    assert "metric: expected a string, got int 3" in str(caught.value)
    assert "batch_size: expected a positive integer, got -1" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def task(:\n", "my_task.py, line 1: importing the file raised SyntaxError"),
        ("import torch\n\n1 / 0\n", "my_task.py, line 3: importing the file raised ZeroDivisionError"),
        ("def task():\n    return undefined\n", "my_task.py, line 2: task() raised NameError"),
        ("def tasks():\n    pass\n", "my_task.py has no function 'task'; did you mean tasks?"),
        ("def task():\n    raise SystemExit(5)\n", "my_task.py, line 2: task() raised SystemExit: 5"),
        ("task = 3\n", "expected a function 'task' in my_task.py, got int 3"),
    ],
)
def test_a_file_that_fails_is_told_with_its_line(tmp_path, text, expected):
    path = tmp_path / "my_task.py"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(expected)):
        tasks.load(f"{path}:task")


def test_a_missing_file_and_a_missing_function_name(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        tasks.load(str(tmp_path / "none.py:task"))
    with pytest.raises(UserError, match=r"named FILE\.py:FUNCTION"):
        tasks.load("my_task.py")


def test_a_changed_file_is_loaded_again_and_has_another_hash(tmp_path):
    reference = written(tmp_path)
    first, before = tasks.load(reference), user_task.source_hash(reference)
    assert tasks.load(reference) is first
    written(tmp_path, 'name="spirals"', 'name="curls"')
    assert tasks.load(reference).name == "curls"
    assert user_task.source_hash(reference) != before
