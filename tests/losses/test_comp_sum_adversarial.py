"""Oracles of the adversarial half of comp_sum: spectral norms, corners of cubes, brute force over balls, the loss written out."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradwise.losses import SmoothAdversarialCompSumLoss, comp_sum_loss, smooth_adversarial_comp_sum

TAUS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def labels(classes: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def margin_matrix(weight: Tensor, label: int) -> Tensor:
    """A with rows w_y - w_{y'}: the margins of a linear model are A x."""
    return torch.stack([weight[label] - row for k, row in enumerate(weight) if k != label])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(classes: int, features: int, seed: int = 0) -> nn.Linear:
    model = nn.Linear(features, classes).double()
    model.load_state_dict({"weight": normal(classes, features, seed=seed), "bias": normal(classes, seed=seed + 1)})
    return model


def movement(model: nn.Module, x: Tensor, y: Tensor, **arguments) -> Tensor:
    """The supremum alone: the difference that nu = 1 makes."""
    with_term = smooth_adversarial_comp_sum(model, x, y, nu=1.0, reduction="none", generator=generator(), **arguments)
    return with_term - smooth_adversarial_comp_sum(model, x, y, nu=0.0, reduction="none", **arguments)


@pytest.mark.parametrize("tau", TAUS)
def test_without_the_term_it_is_the_comp_sum_loss_of_the_scaled_scores(tau):
    model, x, y = linear(4, 3), normal(6, 3, seed=5), labels(4, 6)
    for rho in (1.0, 2.5):
        for arguments in ({"nu": 0.0}, {"gamma": 0.0}):
            loss = smooth_adversarial_comp_sum(model, x, y, tau=tau, rho=rho, **arguments)
            torch.testing.assert_close(loss, comp_sum_loss(model(x) / rho, y, tau))


def test_movement_of_a_linear_model_in_the_euclidean_ball_is_the_spectral_norm():
    gamma = 0.3
    for seed in range(4):
        model = linear(5, 6, seed=seed)
        x, y = normal(5, 6, seed=7), torch.arange(5)
        exact = torch.stack([gamma * torch.linalg.matrix_norm(margin_matrix(model.weight, label), 2) for label in range(5)])
        found = movement(model, x, y, gamma=gamma, norm="2", steps=200, step_size=10.0)  # long steps: power iteration
        assert (found <= exact + 1e-9).all()
        assert (found >= 0.999 * exact).all()
        assert (movement(model, x, y, gamma=gamma, norm="2") >= 0.7 * exact).all()  # the default ten steps


def test_movement_of_a_linear_model_in_the_maximum_ball_is_at_a_corner():
    gamma = 0.2
    corners = gamma * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    for seed in range(4):
        model = linear(3, 4, seed=seed)
        x, y = normal(3, 4, seed=7), torch.arange(3)
        exact = torch.stack([(corners @ margin_matrix(model.weight, label).T).norm(dim=1).max() for label in range(3)])
        found = movement(model, x, y, gamma=gamma, steps=20)
        assert (found <= exact + 1e-9).all()
        assert (found >= 0.8 * exact).all()  # a sum of squares has several peaks in a cube


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("rho", [0.5, 2.0])
def test_bounds_the_adversarial_margin_loss_found_by_brute_force(tau, rho):
    classes, gamma = 3, 0.25
    model, x, y = linear(classes, 2, seed=3), normal(12, 2, seed=9), labels(classes, 12)
    ticks = torch.linspace(-gamma, gamma, 41, dtype=torch.float64)
    inside = x[:, None, :] + torch.cartesian_prod(ticks, ticks)[None]  # (12, 1681, 2)
    scores = model(inside)
    margins = scores.gather(2, y[:, None, None].expand(-1, scores.shape[1], 1)) - scores
    ramp = (1 - margins / rho).clamp(0, 1).sum(2) - 1  # without y' = y, whose ramp is 1
    phi = torch.log1p(ramp) if tau == 1 else ((1 + ramp) ** (1 - tau) - 1) / (1 - tau)
    nu = math.sqrt(classes - 1) / rho
    arguments = {"tau": tau, "rho": rho, "nu": nu, "gamma": gamma, "steps": 20, "generator": generator()}
    smooth = smooth_adversarial_comp_sum(model, x, y, **arguments, reduction="none")
    assert (phi.amax(1) <= smooth + 1e-9).all()


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("clamp", [None, (0.0, 1.0)])
def test_ascent_stays_in_the_ball_and_in_the_box(norm, clamp):
    seen: list[Tensor] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return super().forward(x)

    x = torch.tensor([[0.5, 0.98, 0.01], [1.2, 0.5, -0.3]])  # the second lies outside the box
    arguments = {"gamma": 0.1, "norm": norm, "steps": 3, "clamp": clamp, "generator": generator()}
    smooth_adversarial_comp_sum(Watched(3, 4), x, torch.tensor([0, 1]), **arguments)
    final = seen[-1]
    assert not torch.equal(final, x)
    assert (torch.linalg.vector_norm(final - x, math.inf if norm == "inf" else 2, dim=1) <= 0.1 + 1e-6).all()
    if clamp is not None:
        assert final[0].clamp(0, 1).equal(final[0])
        assert final[1, 0] <= 1.2
        assert final[1, 2] >= -0.3


def test_gradient_flows_through_both_evaluations_but_not_through_the_ascent():
    """Against the same loss written out at the x' that the ascent chose."""
    chosen: list[Tensor] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            chosen.append(x.detach())
            return super().forward(x)

    model = Watched(3, 4).double()
    x, y = normal(5, 3), labels(4, 5)
    loss = smooth_adversarial_comp_sum(model, x, y, rho=2.0, nu=0.7, gamma=0.3, generator=generator())
    grads = torch.autograd.grad(loss, list(model.parameters()))
    moved, scores = model(chosen[-1]), model(x)
    shift = (moved - moved.gather(1, y[:, None])) - (scores - scores.gather(1, y[:, None]))
    written_out = (cross_entropy(scores / 2, y, reduction="none") + 0.7 * shift.norm(dim=1)).mean()
    torch.testing.assert_close(loss, written_out)
    for grad, expected in zip(grads, torch.autograd.grad(written_out, list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, expected)


def test_a_resumed_run_draws_the_same_starts(tmp_path):
    model, batch = linear(4, 3), (normal(6, 3), labels(4, 6))
    objective = SmoothAdversarialCompSumLoss(gamma=0.2, steps=1, generator=generator(5))
    objective(model, batch)
    torch.save(objective.state_dict(), tmp_path / "objective.pt")
    expected = [objective(model, batch).item() for _ in range(2)]
    assert expected[0] != expected[1]
    resumed = SmoothAdversarialCompSumLoss(gamma=0.2, steps=1, generator=generator(99))
    resumed.load_state_dict(torch.load(tmp_path / "objective.pt", weights_only=True))
    assert [resumed(model, batch).item() for _ in range(2)] == expected


def test_training_on_it_shrinks_the_movement():
    """The second term at work: less movement than after training on the clean term alone."""
    x, y = normal(64, 6, dtype=torch.float32), labels(3, 64)
    left = {}
    for nu in (0.0, 1.0):
        model = nn.Linear(6, 3)
        model.load_state_dict({"weight": normal(3, 6, dtype=torch.float32), "bias": torch.zeros(3)})
        objective = SmoothAdversarialCompSumLoss(nu=nu, gamma=0.2, steps=3, generator=generator())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(40):
            optimizer.zero_grad()
            objective(model, (x, y)).backward()
            optimizer.step()
        left[nu] = movement(model, x, y, gamma=0.2).mean().item()
    assert left[1.0] < 0.7 * left[0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": -1.0}, "tau"),
        ({"rho": 0.0}, "rho.*0"),
        ({"nu": -1.0}, "nu.*-1"),
        ({"gamma": -0.1}, "gamma.*-0.1"),
        ({"norm": "1"}, "norm.*'1'"),
        ({"steps": 0}, "steps.*0"),
        ({"step_size": 0.0}, "step_size"),
        ({"clamp": (1.0, 0.0)}, "clamp"),
        ({"reduction": "average"}, "reduction"),
    ],
)
def test_adversarial_arguments_are_checked_when_made_and_when_called(arguments, message):
    with pytest.raises(ValueError, match=message):
        SmoothAdversarialCompSumLoss(**arguments)
    with pytest.raises(ValueError, match=message):
        smooth_adversarial_comp_sum(linear(3, 2), normal(4, 2), labels(3, 4), **arguments)


def test_adversarial_inputs_are_checked():
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(5,\)"):
        smooth_adversarial_comp_sum(linear(3, 2), normal(4, 2), labels(3, 5))
    with pytest.raises(TypeError, match="int64"):
        smooth_adversarial_comp_sum(linear(3, 2), labels(3, 4, 2), labels(3, 4))
    with pytest.raises(TypeError, match="Tensor"):
        SmoothAdversarialCompSumLoss()(linear(3, 2), normal(4, 2))
    with pytest.raises(ValueError, match="none"):
        SmoothAdversarialCompSumLoss(reduction="none")


def test_objective_can_be_copied():
    objective = SmoothAdversarialCompSumLoss(gamma=0.2, generator=generator(3))
    model, batch = linear(4, 3), (normal(6, 3), labels(4, 6))
    assert copy.deepcopy(objective)(model, batch).item() == objective(model, batch).item()
