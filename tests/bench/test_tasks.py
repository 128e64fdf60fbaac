"""Tasks: real data, fixed splits, initial weights and batches that depend on the seed alone."""

from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradwise.bench import language_model, tasks, user_task
from gradwise.core.errors import UserError


@pytest.mark.parametrize("name", tasks.names())
def test_a_built_in_task_passes_the_checks_a_users_own_must_pass(name):
    user_task.check(tasks.load(name), name)


@pytest.mark.parametrize("name", tasks.names())
def test_no_example_is_in_two_splits_by_position(name):
    task = tasks.load(name)
    sizes = [len(s[0]) for s in (task.train, task.validation, task.test)]
    assert min(sizes) > 0
    assert all(len({len(x) for x in s}) == 1 for s in (task.train, task.validation, task.test))


def test_splits_cut_the_data_once_and_completely():
    parts = tasks.split(torch.arange(103), torch.arange(103) * 2)
    together = torch.cat([part[0] for part in parts])
    assert together.sort().values.tolist() == list(range(103))
    assert all(torch.equal(a * 2, b) for a, b in parts)


def test_inputs_are_scaled_with_the_training_split_alone():
    train = tasks.load("wine").train[0]
    torch.testing.assert_close(train.mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(13))
    assert tasks.load("wine").validation[0].mean(0).abs().max() > 1e-3


def test_batches_are_the_same_at_the_same_seed_and_cover_an_epoch():
    task = tasks.load("breast_cancer")
    a, b, c = (list(islice(task.batches(seed), 25)) for seed in (3, 3, 4))
    assert all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    assert any(not torch.equal(p[0], q[0]) for p, q in zip(a, c, strict=True))
    per_epoch = len(task.train[0]) // task.batch_size
    rows = torch.cat([batch[0] for batch in a[:per_epoch]])
    assert len(rows.unique(dim=0)) == len(rows) == per_epoch * task.batch_size


def test_a_batch_larger_than_the_data_is_all_of_it():
    data = (torch.arange(5.0)[:, None],)
    model, objective = tasks.seeded(lambda: nn.Linear(1, 1)), lambda model, batch: model(batch[0]).sum()
    task = tasks.Task("t", "m", "lower", model, objective, data, data, data, evaluate=lambda model, data: 0.0, batch_size=64)
    assert sorted(next(task.batches(0))[0].flatten().tolist()) == [0, 1, 2, 3, 4]


def test_initial_weights_come_from_the_generator_and_leave_the_global_state_alone():
    model = tasks.load("digits").model
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (model(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a[0].weight, c[0].weight)


def test_the_data_hash_sees_one_changed_number():
    import dataclasses

    task = tasks.load("wine")
    changed = task.test[0].clone()
    changed[3, 4] += 1e-3
    assert dataclasses.replace(task, test=(changed, task.test[1])).data_hash() != task.data_hash()
    assert dataclasses.replace(task).data_hash() == task.data_hash()


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(UserError, match="unknown task 'digit'; did you mean 'digits'"):
        tasks.load("digit")


def test_accuracy_is_nan_when_a_logit_is_not_finite():
    data = (torch.tensor([[1.0, float("inf")]]), torch.tensor([1]))
    assert tasks.accuracy(nn.Identity(), data) != tasks.accuracy(nn.Identity(), data)


def test_the_language_model_sees_no_future():
    model = language_model.CharGPT(11, width=16, heads=2, layers=2, context=8).eval()
    a = torch.randint(0, 11, (1, 8), generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[0, 5:] = (b[0, 5:] + 1) % 11
    torch.testing.assert_close(model(a)[..., :5], model(b)[..., :5])
    assert not torch.allclose(model(a)[..., 5:], model(b)[..., 5:])


def test_an_untrained_language_model_is_near_uniform():
    task = tasks.load("stdlib_text")
    model = task.model(torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        bits = task.evaluate(model, tuple(x[:32] for x in task.validation))
    assert bits == pytest.approx(torch.tensor(101.0).log2().item(), abs=0.3)


def test_bits_per_character_is_cross_entropy_over_log_2():
    model = language_model.CharGPT(11, width=16, heads=2, layers=1, context=4).eval()
    data = language_model.windows(torch.randint(0, 11, (401,), generator=torch.Generator().manual_seed(1)), context=4)
    expected = cross_entropy(model(data[0]).transpose(1, 2).reshape(-1, 11), data[1].flatten()) / torch.tensor(2.0).log()
    with torch.no_grad():
        assert language_model.bits_per_character(model, data) == pytest.approx(float(expected), rel=1e-5)


def test_windows_give_each_character_its_successor():
    inputs, target = language_model.windows(torch.arange(1000), context=7)
    assert torch.equal(target, inputs + 1)
    assert inputs.flatten().tolist() == list(range(142 * 7))
