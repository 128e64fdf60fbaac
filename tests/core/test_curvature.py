"""Oracles of curvature products: dense matrices from autograd, finite differences, and what every such matrix must satisfy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradwise.core.curvature import ggn_product, hessian_operator, hvp, jvp, over_batches, vjp
from gradwise.core.fisher import fisher_product, sample_targets
from gradwise.core.named_tensors import add, dot, flatten, randn_like, scale, unflatten
from gradwise.core.per_example import per_example_gradients
from gradwise.core.protocols import Batch, NamedTensors, loss_function, supervised, trainable

MODES = ["forward", "reverse"]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Attention(nn.Module):
    """One attention block over 3 tokens, the fused kernel included, read out as 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x.view(len(x), 3, 4)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.view(len(x), 3, 4))[0][:, -1]


class Cube(torch.autograd.Function):
    """A custom function in the old style: torch.func refuses it, autograd differentiates it twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ),
    "attention": Attention,
    "encoder layer": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 4)), nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).eval(), nn.Flatten(), nn.Linear(12, 3)
    ),
    "lstm": Recurrent,
}


def _setting(name: str = "mlp", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, NamedTensors, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    return model, trainable(model), (torch.randn(6, 12, dtype=dtype), torch.randint(3, (6,)))


LOSS = supervised(F.cross_entropy)


def _dense(product: Callable[[NamedTensors], NamedTensors], params: NamedTensors) -> Tensor:
    """The matrix of a product, column by column."""
    size = sum(p.numel() for p in params.values())
    return torch.stack([flatten(product(unflatten(e, params))) for e in torch.eye(size, dtype=torch.float64)], 1)


def _hessian(f: Callable[[Tensor], Tensor], params: NamedTensors) -> Tensor:
    return torch.autograd.functional.hessian(f, flatten(params).detach())


def _jacobian(model: nn.Module, params: NamedTensors, x: Tensor) -> Tensor:
    def outputs(flat: Tensor) -> Tensor:
        return torch.func.functional_call(model, unflatten(flat, params), (x,))

    return torch.autograd.functional.jacobian(outputs, flatten(params).detach())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_hvp_is_autograds_dense_hessian(name: str, mode: str) -> None:
    model, params, batch = _setting(name)
    loss_fn = loss_function(model, LOSS)
    expected = _hessian(lambda flat: loss_fn(unflatten(flat, params), batch), params)
    found = _dense(partial(hvp, loss_fn, params, batch, mode=mode), params)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(_dense(hessian_operator(loss_fn, params, batch), params), expected)


@pytest.mark.parametrize("name", MODELS)
def test_hvp_is_the_finite_difference_of_gradients(name: str) -> None:
    model, params, batch = _setting(name)
    loss_fn, vector, step = loss_function(model, LOSS), randn_like(params, _generator()), 1e-5

    def gradient(shift: float) -> NamedTensors:
        leaves = {key: (p + shift * vector[key]).detach().requires_grad_() for key, p in params.items()}
        return dict(zip(leaves, torch.autograd.grad(loss_fn(leaves, batch), list(leaves.values())), strict=True))

    expected = scale(add(gradient(step), gradient(-step), alpha=-1.0), 1 / (2 * step))
    torch.testing.assert_close(hvp(loss_fn, params, batch, vector), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_ggn_is_the_explicit_product_of_jacobians(name: str, mode: str) -> None:
    model, params, (x, y) = _setting(name)
    jacobian, p = _jacobian(model, params, x), model(x).softmax(1).detach()
    output_hessian = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / len(x)
    expected = torch.einsum("nop,noq,nqr->pr", jacobian, output_hessian, jacobian)
    found = _dense(partial(ggn_product, *_parts(model), params, (x, y), mode=mode), params)
    torch.testing.assert_close(found, expected)
    assert torch.linalg.eigvalsh(found).min() > -1e-12


def _parts(model: nn.Module) -> tuple[Callable[[NamedTensors, Batch], Tensor], Callable[[Tensor, Batch], Tensor]]:
    return lambda p, b: torch.func.functional_call(model, p, (b[0],)), lambda output, b: F.cross_entropy(output, b[1])


@pytest.mark.parametrize("name", MODELS)
def test_both_modes_and_auto_agree_on_every_model(name: str) -> None:
    model, params, batch = _setting(name)
    vector = randn_like(params, _generator())
    found = {mode: ggn_product(*_parts(model), params, batch, vector, mode=mode) for mode in ("auto", "reverse")}
    torch.testing.assert_close(found["auto"], found["reverse"])
    losses = loss_function(model, supervised(nn.CrossEntropyLoss(reduction="none")))
    gradients = per_example_gradients(losses, params, batch, chunk_size=1)
    rows = torch.stack([flatten({key: g[i] for key, g in gradients.items()}) for i in range(6)])
    expected = unflatten(rows.T @ (rows @ flatten(vector)) / 6, params)
    for mode in ("auto", "reverse"):
        torch.testing.assert_close(fisher_product(losses, params, batch, vector, mode=mode), expected)


def test_the_hessian_of_a_linear_model_with_squared_error_is_its_gauss_newton_matrix() -> None:
    model, x, y = nn.Linear(12, 3).double(), torch.randn(6, 12, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    params = trainable(model)
    vector = randn_like(params, _generator())
    h = hvp(loss_function(model, supervised(F.mse_loss)), params, (x, y), vector)
    g = ggn_product(_parts(model)[0], lambda output, b: F.mse_loss(output, b[1]), params, (x, y), vector)
    torch.testing.assert_close(h, g)


def test_the_hessian_is_gauss_newton_plus_what_the_residuals_bend() -> None:
    """H = G + sum_o dloss/do * Hessian of output o."""
    model, params, batch = _setting()
    loss_fn, vector = loss_function(model, LOSS), randn_like(params, _generator())
    model_fn, loss_on_output = _parts(model)
    output = model(batch[0]).detach().requires_grad_()
    (residual,) = torch.autograd.grad(loss_on_output(output, batch), output)
    bend = hvp(lambda p, b: (residual * model_fn(p, b)).sum(), params, batch, vector)
    g = ggn_product(model_fn, loss_on_output, params, batch, vector)
    torch.testing.assert_close(hvp(loss_fn, params, batch, vector), add(g, bend))


def test_sampled_fisher_is_unbiased_for_gauss_newton() -> None:
    model, params, (x, y) = _setting()
    losses = loss_function(model, supervised(nn.CrossEntropyLoss(reduction="none")))
    vector, generator = randn_like(params, _generator()), _generator(1)
    exact = flatten(ggn_product(*_parts(model), params, (x, y), vector))
    draws = torch.stack([
        flatten(fisher_product(losses, params, (x, sample_targets(model(x), generator=generator)), vector)) for _ in range(300)
    ])  # fmt: skip
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 4.5 * error + 1e-12).all()
    assert (error.norm() < exact.norm()).item()


@pytest.mark.parametrize(("likelihood", "output", "mean", "variance"), [
    ("categorical", torch.tensor([0.0, 1.0986]), 0.75, 0.1875),
    ("bernoulli", torch.tensor([1.0986]), 0.75, 0.1875),
    ("gaussian", torch.tensor([2.0]), 2.0, 1.0),
])  # fmt: skip
def test_sampled_targets_have_the_models_distribution(likelihood: Any, output: Tensor, mean: float, variance: float) -> None:
    drawn = sample_targets(output.expand(20_000, -1), likelihood, generator=_generator()).double()
    assert abs(drawn.mean() - mean) < 4 * (variance / 20_000) ** 0.5
    assert abs(drawn.var() - variance) < 0.05 * max(variance, 0.3)
    repeated = sample_targets(output.expand(20_000, -1), likelihood, generator=_generator()).double()
    assert torch.equal(drawn, repeated)


def test_sequence_logits_give_one_label_a_position() -> None:
    assert sample_targets(torch.randn(2, 5, 7), generator=_generator()).shape == (2, 5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), a=st.floats(-3, 3), kind=st.sampled_from(["hessian", "ggn", "fisher"]))
def test_products_are_linear_and_symmetric(seed: int, a: float, kind: str) -> None:
    model, params, batch = _setting()
    losses = loss_function(model, supervised(nn.CrossEntropyLoss(reduction="none")))
    product = {
        "hessian": partial(hvp, loss_function(model, LOSS), params, batch),
        "ggn": partial(ggn_product, *_parts(model), params, batch),
        "fisher": partial(fisher_product, losses, params, batch),
    }[kind]
    generator = _generator(seed)
    u, v = randn_like(params, generator), randn_like(params, generator)
    torch.testing.assert_close(product(add(u, v, alpha=a)), add(product(u), product(v), alpha=a))
    torch.testing.assert_close(dot(product(u), v), dot(u, product(v)))


@pytest.mark.parametrize("mode", MODES)
def test_jvp_and_vjp_are_adjoint_and_explicit(mode: Any) -> None:
    model, params, (x, _) = _setting()
    jacobian = _jacobian(model, params, x).flatten(0, 1)
    f = lambda p: torch.func.functional_call(model, p, (x,))  # noqa: E731
    vector, cotangent = randn_like(params, _generator()), torch.randn(6, 3, dtype=torch.float64)
    output, tangent = jvp(f, params, vector, mode=mode)
    torch.testing.assert_close(output, model(x).detach())
    torch.testing.assert_close(tangent.flatten(), jacobian @ flatten(vector))
    torch.testing.assert_close(flatten(vjp(f, params, cotangent, mode=mode)), jacobian.T @ cotangent.flatten())


def test_batches_are_weighted_by_their_size() -> None:
    model, params, (x, y) = _setting()
    loss_fn, vector = loss_function(model, LOSS), randn_like(params, _generator())
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    whole = hvp(loss_fn, params, (x, y), vector)
    torch.testing.assert_close(over_batches(partial(hvp, loss_fn, params), parts)(vector), whole)
    summed = over_batches(partial(hvp, loss_fn, params), parts, weights=[1, 0])(vector)
    torch.testing.assert_close(summed, hvp(loss_fn, params, parts[0], vector))


def test_custom_functions_unknown_to_torch_func_fall_back() -> None:
    params = {"w": torch.tensor([1.0, 2.0])}
    loss = lambda p, _: Cube.apply(p["w"]).sum()  # noqa: E731
    one = {"w": torch.ones(2)}
    assert hvp(loss, params, None, one)["w"].tolist() == [6.0, 12.0]
    found = ggn_product(lambda p, _: Cube.apply(p["w"]), lambda o, _: 0.5 * o.square().sum(), params, None, one)
    assert found["w"].tolist() == [9.0, 144.0]
    with pytest.raises(RuntimeError, match="setup_context"):
        hvp(loss, params, None, one, mode="forward")


def test_parameters_that_do_not_matter_or_not_bend_have_zero_rows() -> None:
    params = {"linear": torch.ones(2), "unused": torch.ones(3), "square": torch.ones(1)}
    loss = lambda p, _: p["linear"].sum() + p["square"].square().sum()  # noqa: E731
    for mode in MODES:
        found = hvp(loss, params, None, {name: torch.ones_like(p) for name, p in params.items()}, mode=mode)
        assert {name: t.tolist() for name, t in found.items()} == {"linear": [0, 0], "unused": [0, 0, 0], "square": [2]}
        assert hvp(lambda p, _: p["w"].sum(), {"w": torch.ones(1)}, None, {"w": torch.ones(1)}, mode=mode)["w"].item() == 0


def test_products_run_under_vmap_and_leave_no_graph_or_setting_behind() -> None:
    model, params, batch = _setting()
    product = partial(hvp, loss_function(model, LOSS), params, batch)
    vectors = {name: torch.randn(3, *p.shape, dtype=p.dtype) for name, p in params.items()}
    together = torch.vmap(product)(vectors)
    one = product({name: v[1] for name, v in vectors.items()})
    torch.testing.assert_close({name: t[1] for name, t in together.items()}, one)
    assert not any(t.requires_grad for t in one.values())
    assert all(p.grad is None for p in params.values())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_bad_arguments_are_named() -> None:
    loss, params = lambda p, b: p["w"].square().sum(), {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"vector\['w'\] must have the parameter's shape \(2,\), got \(3,\)"):
        hvp(loss, params, None, {"w": torch.ones(3)})
    with pytest.raises(ValueError, match="names differ"):
        hvp(loss, params, None, {"v": torch.ones(2)})
    with pytest.raises(ValueError, match=r"scalar, got shape \(2,\)"):
        hvp(lambda p, b: p["w"], params, None, params)
    with pytest.raises(ValueError, match='mode must be "auto", "forward" or "reverse", got \'backward\''):
        hvp(loss, params, None, params, mode="backward")
    with pytest.raises(ValueError, match=r"one loss an example, shape \(N,\), got \(\)"):
        fisher_product(loss, params, None, params)
    with pytest.raises(ValueError, match="likelihood must be"):
        sample_targets(torch.ones(2), "poisson")
    with pytest.raises(ValueError, match="at least one batch"):
        over_batches(partial(hvp, loss, params), [])
    with pytest.raises(ValueError, match="one a batch, got 2 for 1"):
        over_batches(partial(hvp, loss, params), [torch.ones(1)], weights=[1, 2])


def test_an_operator_without_second_derivative_says_so() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    with pytest.raises(RuntimeError, match="once_differentiable") as caught:
        hvp(lambda p, _: Once.apply(p["w"]).square().sum(), {"w": torch.ones(1)}, None, {"w": torch.ones(1)})
    assert "second derivative" in " ".join(caught.value.__notes__)


