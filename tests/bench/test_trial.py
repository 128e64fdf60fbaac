"""A trial is a pure function; its cost is counted, its budget kept, and divergence is a result with a reason."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn

from gradwise.bench import tasks
from gradwise.bench.recipe import Budget
from gradwise.bench.results import without_timings
from gradwise.bench.sentence import Sentence, Word
from gradwise.bench.trial import EVALUATIONS, died, rehearse, run_trial
from gradwise.core.errors import UserError

SGD = Sentence(Word("sgd"))
STEPS = Budget(kind="steps", amount=50)


def test_the_same_arguments_give_the_same_numbers_whatever_the_global_state():
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        random.seed(noise)
        torch.set_num_threads(noise)
        found.append(without_timings(run_trial("digits", Sentence(Word("adamw")), {"lr": 0.01}, seed=3, budget=STEPS, test=True)))
        assert torch.get_num_threads() == noise
    torch.set_num_threads(1)
    assert found[0] == found[1]
    other = run_trial("digits", Sentence(Word("adamw")), {"lr": 0.01}, seed=4, budget=STEPS, test=True)
    assert without_timings(other)["curve"] != found[0]["curve"]


def test_global_random_states_are_left_as_they_were():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    run_trial("wine", SGD, {"lr": 0.1}, seed=0, budget=STEPS)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_seeds_are_paired_over_methods():
    """At one seed all methods start from the same model: the same validation before the first step, the same first loss."""
    one, two = (
        run_trial("digits", Sentence(Word(name)), {"lr": 1e-3}, seed=9, budget=Budget(kind="steps", amount=1))
        for name in ("adamw", "lion")
    )
    assert one["curve"]["validation"][0] == two["curve"]["validation"][0]
    assert one["curve"]["train_loss"] == two["curve"]["train_loss"]


def test_dropout_in_a_users_model_is_paired_too():
    base = tasks.load("wine")
    model = tasks.seeded(lambda: nn.Sequential(nn.Linear(13, 32), nn.Dropout(0.5), nn.Linear(32, 3)))
    task = dataclasses.replace(base, model=model)
    first, second = (run_trial(task, SGD, {"lr": 0.1}, seed=1, budget=STEPS) for _ in range(2))
    assert without_timings(first) == without_timings(second)


def test_a_trial_is_plain_training():
    """The same run written as a loop reaches the same test figure."""
    from gradwise.bench.words import derived_seed

    task = tasks.load("wine")
    model = task.model(torch.Generator().manual_seed(derived_seed(5, "initialisation")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    for _, batch in zip(range(50), task.batches(derived_seed(5, "data")), strict=False):
        optimizer.zero_grad()
        task.objective(model, batch).backward()
        optimizer.step()
    trial = run_trial("wine", SGD, {"lr": 0.2, "momentum": 0.5}, seed=5, budget=STEPS, test=True)
    with torch.no_grad():
        assert trial["test"] == task.evaluate(model, task.test)
        assert trial["validation"] == task.evaluate(model, task.validation) == trial["curve"]["validation"][-1]


def test_the_test_split_is_not_touched_while_tuning():
    base = tasks.load("wine")
    seen = []
    task = dataclasses.replace(base, evaluate=lambda model, data: seen.append(data is base.test) or base.evaluate(model, data))
    assert run_trial(task, SGD, {"lr": 0.1}, seed=0, budget=STEPS)["test"] is None
    assert not any(seen)
    run_trial(task, SGD, {"lr": 0.1}, seed=0, budget=STEPS, test=True)
    assert sum(seen) == 1


@pytest.mark.parametrize(
    ("kind", "amount", "sentence", "steps"),
    [
        ("steps", 7, SGD, 7),
        ("forwards", 7, SGD, 7),
        ("forwards", 7, Sentence(Word("sgd"), estimator=Word("spsa")), 3),  # two forwards a step; a fourth would exceed
        ("bytes", 275 * 4 * 6, SGD, 6),  # 275 parameters of 4 bytes
        ("bytes", 275 * 4 * 6 - 1, SGD, 5),
        ("bytes", 1, SGD, 1),
    ],
)
def test_a_budget_is_spent_and_never_exceeded(kind, amount, sentence, steps):
    trial = run_trial("wine", sentence, {"lr": 1e-3}, seed=0, budget=Budget(kind=kind, amount=amount))
    assert trial["cost"]["steps"] == steps == trial["curve"]["step"][-1]


def test_a_budget_of_seconds_ends():
    trial = run_trial(
        "wine",
        dataclasses.replace(SGD, schedule=Word("linear_decay")),
        {"lr": 0.1},
        seed=0,
        budget=Budget(kind="seconds", amount=0.05),
    )
    assert trial["status"] == "complete"
    assert trial["cost"]["steps"] >= 1


def test_what_it_cost_is_counted():
    trial = run_trial("wine", Sentence(Word("adam")), {"lr": 1e-3}, seed=0, budget=STEPS)
    cost = trial["cost"]
    assert (cost["steps"], cost["forwards"], cost["backwards"], cost["gradient_bytes"]) == (50, 50, 50, 50 * 1100)
    assert cost["state_bytes"] == 2 * 1100 + 4 * 4  # two moments, a step counter for each of the 4 tensors
    assert cost["peak_bytes"] > 2 * 1100
    assert cost["seconds"] == pytest.approx(trial["curve"]["seconds"][-1])


def test_the_curve_is_evaluated_about_so_often():
    curve = run_trial("wine", SGD, {"lr": 0.1}, seed=0, budget=Budget(kind="steps", amount=100))["curve"]
    assert curve["step"] == list(range(0, 101, 100 // EVALUATIONS))
    assert curve["train_loss"][0] is None
    assert len({len(series) for series in curve.values()}) == 1


@pytest.mark.parametrize("lr", [1e4, 1e30])
def test_divergence_is_a_result_with_a_reason(lr):
    trial = run_trial("diabetes", SGD, {"lr": lr, "momentum": 0.9}, seed=0, budget=STEPS, test=True)
    assert trial["status"] == "diverged"
    assert "training loss became" in trial["reason"]
    assert "at step" in trial["reason"]
    assert trial["validation"] is trial["test"] is None
    assert trial["curve"]["validation"][0] is not None


def failing(error, split="train"):
    base = tasks.load("wine")
    calls = []

    def objective(model, batch):
        calls.append(1)
        if len(calls) > 4:
            raise error
        return base.objective(model, batch)

    return dataclasses.replace(base, objective=objective)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: no"),
    ],
)
def test_no_memory_left_is_a_result(error):
    trial = run_trial(failing(error), SGD, {"lr": 0.1}, seed=0, budget=STEPS)
    assert trial["status"] == "diverged"
    assert trial["reason"].startswith("out of memory")


def test_a_real_allocation_that_cannot_be_had_is_a_result():
    base = tasks.load("wine")
    task = dataclasses.replace(base, objective=lambda model, batch: base.objective(model, batch) + torch.ones(2**55).sum())
    assert "out of memory" in run_trial(task, SGD, {"lr": 0.1}, seed=0, budget=STEPS)["reason"]


def test_a_linear_algebra_error_is_a_result_but_a_mistake_is_raised():
    trial = run_trial(failing(torch.linalg.LinAlgError("svd did not converge")), SGD, {"lr": 0.1}, seed=0, budget=STEPS)
    assert "LinAlgError: svd did not converge, at step 3" in trial["reason"]
    for bug in (AttributeError("a bug"), RuntimeError("shapes (3, 2) and (4,) do not match"), ValueError("information is missing")):
        with pytest.raises(type(bug)):
            run_trial(failing(bug), SGD, {"lr": 0.1}, seed=0, budget=STEPS)


def test_an_error_over_numbers_that_are_not_finite_is_a_result():
    trial = run_trial(failing(ValueError("Input contains NaN.")), SGD, {"lr": 0.1}, seed=0, budget=STEPS)
    assert "ValueError: Input contains NaN., at step 3" in trial["reason"]
    base = tasks.load("wine")

    def objective(model, batch):
        if any(p.abs().max() > 1e30 for p in model.parameters()):
            raise RuntimeError("expected rows that sum to one")
        return base.objective(model, batch)

    trial = run_trial(dataclasses.replace(base, objective=objective), SGD, {"lr": 1e35}, seed=0, budget=STEPS)
    assert "expected rows that sum to one" in trial["reason"]


def test_data_that_differ_from_load_to_load_are_refused():
    """Each worker loads the task for itself: its data must be those of the process that asked."""
    known = tasks.load("wine").data_hash()
    assert run_trial("wine", SGD, {"lr": 0.1}, seed=0, budget=STEPS, data_hash=known)["status"] == "complete"
    with pytest.raises(UserError, match="task 'wine' has other data each time it is loaded"):
        run_trial("wine", SGD, {"lr": 0.1}, seed=0, budget=STEPS, data_hash="0" * 64)


def test_a_metric_that_is_not_finite_is_divergence():
    base = tasks.load("wine")
    calls = []
    task = dataclasses.replace(base, evaluate=lambda model, data: calls.append(1) or (float("nan") if len(calls) > 3 else 0.5))
    trial = run_trial(task, SGD, {"lr": 0.1}, seed=0, budget=STEPS)
    assert "the accuracy became nan" in trial["reason"]
    assert None not in trial["curve"]["validation"]


def test_a_rehearsal_refuses_what_cannot_stand_and_takes_the_rest():
    rehearse(tasks.load("wine"), SGD, {"lr": 0.1})
    with pytest.raises(UserError, match="cannot be replaced"):
        rehearse(tasks.load("diabetes"), Sentence(Word("sgd"), loss=Word("comp_sum")), {"lr": 0.1})
    assert rehearse(tasks.load("wine"), SGD, {"lr": 0.1}).forwards == 1
    greedy = dataclasses.replace(tasks.load("wine"), objective=lambda model, batch: torch.ones(2**55).sum())
    assert rehearse(greedy, SGD, {"lr": 0.1}) is None  # no memory is a result, which the trials report
    with pytest.raises(UserError, match="one step on task 'stdlib_text' raised"):
        rehearse(tasks.load("stdlib_text"), Sentence(Word("sgd"), loss=Word("smooth_adversarial_comp_sum")), {"lr": 0.1})


def test_a_run_nobody_lived_to_report_has_the_same_shape():
    told = run_trial("wine", SGD, {"lr": 0.1}, seed=0, budget=STEPS)
    lost = died({"seed": 0, "hyper": {"lr": 0.1}}, "killed")
    assert lost.keys() == told.keys()
    assert lost["cost"].keys() == told["cost"].keys()
    assert lost["curve"].keys() == told["curve"].keys()
