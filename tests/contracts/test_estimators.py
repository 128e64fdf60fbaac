"""The estimator contract, run over everything that `gradwise.estimators` exports and that satisfies the `Estimator` protocol.

Every estimator must work as built with no arguments. There is no list of exemptions; what may differ is what an estimator states:
- `order` says what it asks of memory: 0 runs at the memory of inference plus the parameters of the largest operator, 1 at the
  memory of one forward and backward pass plus one gradient; what it keeps in its `state_dict` comes on top.
- `bias`, where it has one: the most that ||E g - grad|| / ||grad|| may be on a quadratic. Without it the estimator is unbiased.
"""

import inspect
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwise.estimators
from gradwise.core.cost import PeakMemory, tensor_bytes
from gradwise.core.named_tensors import dense
from gradwise.core.protocols import Estimator, LazyGradient, Objective, loss_function, supervised, trainable

ESTIMATORS = [
    value
    for name, value in vars(gradwise.estimators).items()
    if not name.startswith("_") and inspect.isclass(value) and hasattr(value, "backward") and hasattr(value, "order")
]
every = pytest.mark.parametrize("build", ESTIMATORS, ids=lambda cls: cls.__name__)
SQUARED = supervised(nn.functional.mse_loss)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2)).to(dtype)
    return model, (torch.randn(16, 4).to(dtype), torch.randn(16, 2).to(dtype))


def called(
    estimator: Estimator, model: nn.Module, objective: Objective, batch: Any, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    loss, grads = estimator(loss_function(model, objective), trainable(model), batch, generator=seeded(seed))
    return loss, {name: dense(g) for name, g in grads.items()}


def test_the_room_exports_estimators():
    assert {"Backprop", "SPSA"} <= {cls.__name__ for cls in ESTIMATORS}


@every
def test_satisfies_the_protocol_as_built_with_no_arguments(build):
    estimator = build()
    assert isinstance(estimator, Estimator)
    assert estimator.order in (0, 1)
    assert list(inspect.signature(build.__call__).parameters) == ["self", "loss_fn", "params", "batch", "generator"]
    assert list(inspect.signature(build.backward).parameters) == ["self", "model", "objective", "batch", "generator"]


@every
def test_unbiased_or_biased_as_stated_on_a_quadratic(build):
    h = torch.tensor([[3.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    theta = {"a": torch.tensor([1.0, -2.0], dtype=torch.float64), "b": torch.tensor(0.5, dtype=torch.float64)}
    exact = torch.cat([h @ theta["a"] + theta["b"], (2 * theta["b"] + theta["a"].sum()).reshape(1)])

    def loss_fn(params, batch):
        return 0.5 * params["a"] @ h @ params["a"] + params["b"] * params["a"].sum() + params["b"] ** 2

    estimator, generator, draws = build(), seeded(), []
    for _ in range(1500):
        _, grads = estimator(loss_fn, theta, None, generator=generator)
        draws.append(torch.cat([dense(g).reshape(-1) for g in grads.values()]))
    drawn = torch.stack(draws)
    error = 5 * drawn.std(0) / len(draws) ** 0.5 + getattr(estimator, "bias", 0.0) * exact.norm() + 1e-9
    assert ((drawn.mean(0) - exact).abs() <= error).all()


@every
def test_same_generator_same_gradient(build):
    model, batch = network()
    first, again = called(build(), model, SQUARED, batch, seed=3), called(build(), model, SQUARED, batch, seed=3)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(first[1][n], again[1][n]) for n in first[1])


@every
def test_gradients_have_the_names_shapes_and_dtypes_of_the_parameters(build):
    model, batch = network()
    params = trainable(model)
    _, grads = build()(loss_function(model, SQUARED), params, batch, generator=seeded())
    assert list(grads) == list(params)
    for name, g in grads.items():
        assert isinstance(g, Tensor | LazyGradient)
        assert (g.shape, g.dtype, g.device) == (params[name].shape, params[name].dtype, params[name].device)
        assert not dense(g).requires_grad
        assert bool(dense(g).isfinite().all())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_parameters_are_unchanged_to_the_bit_and_calling_leaves_no_grad(build, dtype):
    model, batch = network(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    estimator = build()
    called(estimator, model, SQUARED, batch)
    assert all(p.grad is None for p in model.parameters())
    estimator.backward(model, SQUARED, batch, generator=seeded())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_backward_agrees_with_calling_and_adds_to_grad(build, dtype):
    model, batch = network(dtype)
    loss, grads = called(build(), model, SQUARED, batch)
    assert build().backward(model, SQUARED, batch, generator=seeded()) == loss
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())
    build().backward(model, SQUARED, batch, generator=seeded())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * grads[name])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_loss_is_a_detached_scalar_near_the_loss_here(build, dtype):
    model, batch = network(dtype)
    here = float(SQUARED(model, batch).detach())
    for loss in (called(build(), model, SQUARED, batch)[0], build().backward(model, SQUARED, batch, generator=seeded())):
        assert loss.shape == ()
        assert not loss.requires_grad
        assert float(loss) == pytest.approx(here, rel=0.05)


@every
def test_frozen_parameters_are_left_out_and_untouched(build):
    model, batch = network()
    model[0].requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    _, grads = called(build(), model, SQUARED, batch)
    build().backward(model, SQUARED, batch, generator=seeded())
    assert not any(name.startswith("0.") for name in grads)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[0].bias.grad is None
    assert not model[0].weight.requires_grad


@every
def test_state_round_trip_resumes_exactly(build):
    model, batch = network()
    f, params = loss_function(model, SQUARED), trainable(model)
    straight = build()
    for _ in range(3):
        straight(f, params, batch)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = build()
    resumed(f, params, batch)  # whatever it did before does not matter
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        expected, actual = (estimator(f, params, batch) for estimator in (straight, resumed))
        assert torch.equal(expected[0], actual[0])
        assert all(torch.equal(dense(expected[1][n]), dense(actual[1][n])) for n in params)


@every
def test_global_generators_move_as_by_one_evaluation(build):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)).train()
    batch = torch.randn(16, 4), torch.randn(16, 2)
    torch.manual_seed(0)
    SQUARED(model, batch)
    once = torch.get_rng_state()
    torch.manual_seed(0)
    called(build(), model, SQUARED, batch)
    assert torch.equal(torch.get_rng_state(), once)


@every
def test_memory_is_as_its_order_states(build):
    width, depth = 128, 12
    model = nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])
    batch = torch.randn(32, width), torch.randn(32, width)
    params, estimator = trainable(model), build()
    gradient = sum(p.nbytes for p in params.values())
    with PeakMemory() as inference, torch.no_grad():
        SQUARED(model, batch)
    with PeakMemory() as training:
        torch.autograd.grad(SQUARED(model, batch), list(params.values()))
    with PeakMemory() as memory:
        estimator(loss_function(model, SQUARED), params, batch, generator=seeded())
    stated = inference.peak + 4 * (width * width + width) if estimator.order == 0 else training.peak + gradient
    assert memory.peak <= stated + tensor_bytes(estimator.state_dict()) + 16 * 1024  # the states of random generators


@every
def test_a_loss_that_is_no_scalar_is_refused_with_its_shape(build):
    model, (x, target) = network()
    no_scalar, no_tensor = (lambda m, b: m(x).sum(1)), (lambda m, b: 1.0)
    for bad, message in ((no_scalar, r"scalar tensor, got shape \(16,\)"), (no_tensor, "scalar tensor, got float")):
        with pytest.raises(ValueError, match=message):
            called(build(), model, bad, (x, target))
        with pytest.raises(ValueError, match=message):
            build().backward(model, bad, (x, target), generator=seeded())


@every
def test_a_foreign_state_is_refused(build):
    with pytest.raises(ValueError, match="another_estimators_entry"):
        build().load_state_dict({"another_estimators_entry": 1})
