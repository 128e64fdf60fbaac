"""The seams: what fits them, and that binding a model to an objective changes no number."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from gradwise.core.protocols import Estimator, Exchange, LazyGradient, Transform, loss_function, names_of, supervised, trainable
from gradwise.core.seeded import SeededGradient
from gradwise.estimators import SPSA, Backprop
from gradwise.transforms import ClipNorm, GradientNoise


def test_what_fits_which_seam():
    lazy = SeededGradient("w", ((1, 1.0),), torch.Size([2]), torch.float32, torch.device("cpu"))
    everything = [Backprop(), SPSA(), ClipNorm(1.0), GradientNoise(), lazy, torch.zeros(2), nn.Linear(1, 1), lambda m, b: m(b)]
    assert [type(x).__name__ for x in everything if isinstance(x, Estimator)] == ["Backprop", "SPSA"]
    assert [type(x).__name__ for x in everything if isinstance(x, Transform)] == ["ClipNorm", "GradientNoise"]
    assert [type(x).__name__ for x in everything if isinstance(x, LazyGradient)] == ["SeededGradient"]
    assert not any(isinstance(x, Exchange) for x in everything)


@pytest.mark.parametrize("loss", [mse_loss, nn.MSELoss()])
def test_supervised_is_the_loss_of_the_models_output(loss):
    model, x, y = nn.Linear(3, 2), torch.randn(5, 3), torch.randn(5, 2)
    objective = supervised(loss)
    for batch in ((x, y), [x, y]):
        assert torch.equal(objective(model, batch), mse_loss(model(x), y))
    assert objective.loss is loss
    for bad, name in ((x, "Tensor"), ((x, y, y), "tuple"), ({"x": x, "y": y}, "dict")):
        with pytest.raises(TypeError, match=rf"batch \(input, target\), got {name}"):
            objective(model, bad)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.down.weight = self.up.weight
        self.frozen = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x))) * self.frozen


def test_trainable_names_each_tensor_once_and_no_frozen_one():
    assert list(trainable(Tied())) == ["up.weight"]


def test_a_bound_loss_function_is_the_objective_at_the_given_parameters():
    model, x = Tied(), torch.randn(4, 3)
    f = loss_function(model, lambda m, x: m(x).square().mean())
    other = {"up.weight": torch.randn(3, 3)}
    before = model.up.weight.detach().clone()
    expected = (torch.tanh(x @ other["up.weight"].T) @ other["up.weight"].T * 2).square().mean()  # both tied places, the frozen one kept
    torch.testing.assert_close(f(other, x), expected)
    assert torch.equal(model.up.weight, before)
    assert f.model is model
    gradient = torch.func.grad(f)(trainable(model), x)["up.weight"]
    model(x).square().mean().backward()
    torch.testing.assert_close(gradient, model.up.weight.grad)


def test_the_objective_may_read_the_parameters_too():
    model = nn.Linear(2, 1)
    f = loss_function(model, lambda m, x: m(x).sum() + m.weight.square().sum())
    assert float(f({"weight": torch.full((1, 2), 3.0), "bias": torch.zeros(1)}, torch.ones(1, 2))) == 6 + 18


def test_readable_names_of_an_optimizers_parameters():
    model = nn.Linear(2, 1)
    plain = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1)
    assert names_of(plain) == {id(model.weight): "parameter 0 of group 0", id(model.bias): "parameter 0 of group 1"}
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    assert names_of(named) == {id(model.weight): "weight", id(model.bias): "bias"}
