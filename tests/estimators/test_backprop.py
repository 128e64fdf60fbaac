"""Backprop: the exact gradient, however the batch is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradwise.core.cost import PeakMemory
from gradwise.core.protocols import loss_function, supervised, trainable
from gradwise.estimators import Backprop

SQUARED = supervised(nn.functional.mse_loss)


def regression(examples: int = 10) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    return model, (torch.randn(examples, 4).double(), torch.randn(examples, 2).double())


def test_gradient_of_a_quadratic_is_its_closed_form():
    a, w = torch.randn(5, 5).double(), torch.randn(5).double()
    loss, grads = Backprop()(lambda params, batch: 0.5 * params["w"] @ batch @ params["w"], {"w": w}, a)
    torch.testing.assert_close(grads["w"], 0.5 * (a + a.T) @ w)
    torch.testing.assert_close(loss, 0.5 * w @ a @ w)


def test_gradient_agrees_with_finite_differences():
    model, batch = regression()
    f, params = loss_function(model, SQUARED), {n: p.detach() for n, p in trainable(model).items()}
    _, grads = Backprop()(f, params, batch)
    for name, p in params.items():
        direction = torch.randn_like(p)
        ahead, behind = (f({**params, name: p + h * direction}, batch) for h in (1e-6, -1e-6))
        torch.testing.assert_close((grads[name] * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)


@given(examples=st.integers(1, 12), accumulate=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_micro_batches_of_any_size_give_the_whole_batchs_gradient(examples, accumulate):
    model, batch = regression(examples)
    f, params = loss_function(model, SQUARED), trainable(model)
    if accumulate > examples:
        with pytest.raises(ValueError, match=rf"accumulate={accumulate} cannot split .*\[{examples}\]"):
            Backprop(accumulate)(f, params, batch)
        return
    loss, grads = Backprop()(f, params, batch)
    loss_in_parts, grads_in_parts = Backprop(accumulate)(f, params, batch)
    torch.testing.assert_close(loss_in_parts, loss)
    torch.testing.assert_close(grads_in_parts, grads)


def test_micro_batches_split_nested_batches_and_pass_on_what_is_no_tensor():
    seen = []

    def loss_fn(params, batch):
        seen.append((batch["inputs"][0].shape, batch["weight"], batch["scale"].shape))
        return (params["w"] * batch["inputs"][0]).mean()

    batch = {"inputs": [torch.ones(5, 2)], "weight": 0.5, "scale": torch.tensor(2.0)}
    Backprop(2)(loss_fn, {"w": torch.ones(2)}, batch)
    assert seen == [((3, 2), 0.5, ()), ((2, 2), 0.5, ())]


def test_micro_batches_hold_fewer_activations():
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())])
    batch = (torch.randn(512, 16), torch.randn(512, 16))
    peaks = []
    for accumulate in (1, 8):
        with PeakMemory() as memory:
            Backprop(accumulate)(loss_function(model, SQUARED), trainable(model), batch)
        peaks.append(memory.peak)
    assert peaks[1] < peaks[0] / 3


def test_backward_adds_to_grad_as_torch_does():
    model, batch = regression()
    SQUARED(model, batch).backward()
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss = Backprop().backward(model, SQUARED, batch)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, 2 * once[name])
    assert torch.equal(loss, SQUARED(model, batch).detach())


def test_a_parameter_that_the_loss_does_not_read_has_gradient_zero_and_no_grad():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})

    def objective(model, batch):
        return model["used"](batch).sum()

    _, grads = Backprop()(loss_function(model, objective), trainable(model), torch.ones(3, 2))
    assert torch.equal(grads["unused.weight"], torch.zeros(1, 2))
    Backprop().backward(model, objective, torch.ones(3, 2))
    assert model["unused"].weight.grad is None
    assert torch.equal(model["used"].weight.grad, grads["used.weight"])


def test_tied_weights_get_the_sum_of_both_uses():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    _, grads = Backprop()(loss_function(model, lambda m, x: m(x).sum()), trainable(model), torch.eye(3))
    w = model[0].weight.detach()
    ones = torch.ones(3, 3)
    torch.testing.assert_close(grads, {"0.weight": w.T @ ones + ones @ w.T})  # of sum(W W)


def test_works_inside_no_grad_as_optimizer_closures_need():
    model, batch = regression()
    with torch.no_grad():
        loss, grads = Backprop()(loss_function(model, SQUARED), trainable(model), batch)
        Backprop().backward(model, SQUARED, batch)
    assert not loss.requires_grad
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("accumulate", [0, -1])
def test_accumulate_below_one_is_refused(accumulate):
    with pytest.raises(ValueError, match=f"accumulate must be at least 1 micro-batch, got {accumulate}"):
        Backprop(accumulate)


def test_losses_and_batches_that_cannot_be_used_are_named():
    w = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="does not depend on any trainable parameter"):
        Backprop()(lambda params, batch: batch.sum(), w, torch.ones(2))
    with pytest.raises(TypeError, match="accumulate=2 splits the tensors of a batch"):
        Backprop(2)(lambda params, batch: params["w"].sum(), w, "text")
    with pytest.raises(ValueError, match=r"first dimensions \[2, 3\]"):
        Backprop(2)(lambda params, batch: params["w"].sum(), w, (torch.ones(2), torch.ones(3)))
    with pytest.raises(ValueError, match="no state to load"):
        Backprop().load_state_dict({"generator": 1})
