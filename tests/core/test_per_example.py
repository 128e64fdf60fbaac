"""Oracles of per-example gradients: one example at a time, by ordinary backpropagation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwise.core.cost import PeakMemory
from gradwise.core.example_pass import ExamplePass
from gradwise.core.named_tensors import dot, randn_like
from gradwise.core.per_example import per_example_dots, per_example_gradients, per_example_norms, per_example_weighted_sum
from gradwise.core.protocols import Batch, NamedTensors, Objective, loss_function, supervised, trainable

N = 4
_one_each = supervised(lambda output, target: (output.flatten(1) * target).tanh().sum(1) + output.flatten(1).square().mean(1))


class Lambda(nn.Module):
    """A module from a function of itself and the input, to write odd models in one line."""

    def __init__(self, forward: Callable[[Lambda, Tensor], Tensor], **children: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.apply_to = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(self, x)


class TimeFirst(Lambda):
    """Examples in the second dimension, as torch's sequence modules have them by default."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=module)


def _param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def _tied() -> nn.Module:
    model = Lambda(lambda m, x: m.head(torch.tanh(m.table(x))), table=nn.Embedding(7, 3), head=nn.Linear(3, 7))
    model.head.weight = model.table.weight
    return model


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2, bias=False)), torch.randn(N, 3)),
    "linear on sequences": lambda: (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(N, 6, 3)),
    "linear on long sequences": lambda: (nn.Linear(2, 2), torch.randn(N, 30, 2)),
    "linear on sequences as long as the batch": lambda: (nn.Linear(3, 2), torch.randn(N, N, 3)),
    "linear, time first": lambda: (TimeFirst(nn.Linear(3, 2)), torch.randn(N, N, 3)),
    "linear on flattened rows": lambda: (
        Lambda(lambda m, x: m.a(x.flatten(0, 1)).view(len(x), -1), a=nn.Linear(3, 2)), torch.randn(N, N, 3)
    ),
    "linear on rows, time first": lambda: (
        Lambda(lambda m, x: m.a(x.transpose(0, 1).flatten(0, 1)).view(x.shape[1], len(x), -1).transpose(0, 1), a=nn.Linear(3, 2)),
        torch.randn(N, 5, 3),
    ),
    "matmul and addmm": lambda: (
        Lambda(lambda m, x: torch.addmm(m.b, torch.tanh(x @ m.w), m.v), w=_param(3, 4), v=_param(4, 2), b=_param(2)),
        torch.randn(N, 3),
    ),
    "addmm on flattened rows": lambda: (
        Lambda(lambda m, x: torch.addmm(m.b, x.view(-1, 3), m.w).view(*x.shape[:2], -1), w=_param(3, 4), b=_param(4)),
        torch.randn(N, N, 3),
    ),
    "conv1d": lambda: (
        nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), nn.Tanh(), nn.Conv1d(3, 2, 1)), torch.randn(N, 2, 9)
    ),
    "conv2d": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(4, 2, (2, 1), stride=(1, 2))),
        torch.randn(N, 2, 6, 6),
    ),
    "conv2d, padding same and circular": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 2, (2, 3), padding="same"),
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(2, 1, 2, padding="valid"),
        ),
        torch.randn(N, 1, 5, 5),
    ),
    "conv2d in groups": lambda: (
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Tanh(), nn.Conv2d(4, 6, 2, groups=2)), torch.randn(N, 4, 5, 5)
    ),
    "conv3d": lambda: (
        nn.Sequential(nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), nn.Tanh(), nn.Conv3d(2, 2, (1, 2, 2), padding=1)),
        torch.randn(N, 1, 3, 4, 4),
    ),
    "conv over frames": lambda: (
        Lambda(lambda m, x: m.a(x.flatten(0, 1)).view(len(x), -1), a=nn.Conv2d(2, 4, 2, groups=2)), torch.randn(N, 3, 2, 4, 4)
    ),
    "layer norm": lambda: (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), torch.randn(N, 5, 3)),
    "layer norm over two dimensions": lambda: (nn.LayerNorm((5, 3), bias=False), torch.randn(N, 5, 3)),
    "layer norm, time first": lambda: (TimeFirst(nn.LayerNorm(3)), torch.randn(N, N, 3)),
    "rms norm": lambda: (nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4)), torch.randn(N, 5, 3)),
    "group norm": lambda: (nn.Sequential(nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4)), torch.randn(N, 1, 4, 4)),
    "batch norm, evaluated": lambda: (nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4)).eval(), torch.randn(N, 1, 4, 4)),
    "embedding": lambda: (nn.Sequential(nn.Embedding(5, 3, padding_idx=-1), nn.Linear(3, 2)), torch.randint(5, (N, 6))),
    "module used twice": lambda: (Lambda(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(3, 3)), torch.randn(N, 5, 3)),
    "conv used twice": lambda: (Lambda(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Conv2d(2, 2, 3)), torch.randn(N, 2, 7, 7)),
    "tied embedding": lambda: (_tied(), torch.randint(7, (N, 5))),
    "attention": lambda: (
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        torch.randn(N, N, 4),
    ),
    "attention, evaluated, time first": lambda: (TimeFirst(nn.TransformerEncoderLayer(4, 2, 8).eval()), torch.randn(N, N, 4)),
    "frozen first layer": lambda: (
        nn.Sequential(nn.Linear(3, 5).requires_grad_(False), nn.Tanh(), nn.Linear(5, 2)), torch.randn(N, 3)
    ),
    "unused parameter": lambda: (Lambda(lambda m, x: m.a(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2)), torch.randn(N, 3)),
}  # fmt: skip

# Models with parameters that only torch.func can see, by name (None: all of them).
UNCOVERED: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], list[str] | None]] = {
    "scale": (lambda: (Lambda(lambda m, x: m.a(x) * m.s, a=nn.Linear(3, 2), s=_param(2)), torch.randn(N, 3)), ["s"]),
    "weight used by a layer and on its own": (
        lambda: (Lambda(lambda m, x: m.a(x) + (m.a.weight * m.a.weight).sum(), a=nn.Linear(3, 2)), torch.randn(N, 3)), ["a.weight"],
    ),
    "positions shared by all examples": (
        lambda: (Lambda(lambda m, x: m.a(x) + m.p(torch.arange(x.shape[1])), a=nn.Embedding(5, 3), p=nn.Embedding(6, 3)),
                 torch.randint(5, (N, 6))), ["p.weight"],
    ),
    "a table with as many rows as examples": (
        lambda: (Lambda(lambda m, x: x @ m.a(m.t), a=nn.Linear(2, 2), t=_param(N, 2)), torch.randn(N, N)),
        ["a.bias", "a.weight", "t"],
    ),
    "lstm": (lambda: (Lambda(lambda m, x: m.a(x)[0], a=nn.LSTM(2, 3, batch_first=True)), torch.randn(N, 4, 2)), None),
    "gru, which vmap cannot run": (
        lambda: (Lambda(lambda m, x: m.a(x)[0], a=nn.GRU(2, 3, batch_first=True)), torch.randn(N, 4, 2)), None,
    ),
    "weight norm": (lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), torch.randn(N, 3)),
                    ["parametrizations.weight.original0", "parametrizations.weight.original1"]),
}  # fmt: skip
ALL = MODELS | {name: make for name, (make, _) in UNCOVERED.items()}


def _case(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, x = ALL[name]()
    model = model.to(dtype)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        target = torch.randn_like(model(x).flatten(1))
    return model, (x, target)


def _one_by_one(model: nn.Module, objective: Objective, batch: Batch) -> NamedTensors:
    params = trainable(model)
    rows = []
    for i in range(len(batch[0])):
        loss = objective(model, tuple(t[i : i + 1] for t in batch)).sum()
        rows.append(torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(grads) for name, grads in zip(params, zip(*rows, strict=True), strict=True)}


def _norms(gradients: NamedTensors) -> Tensor:
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()


@pytest.mark.parametrize("name", ALL)
def test_norms_are_those_of_one_example_at_a_time(name: str) -> None:
    model, batch = _case(name)
    torch.testing.assert_close(per_example_norms(model, _one_each, batch), _norms(_one_by_one(model, _one_each, batch)))


@pytest.mark.parametrize("name", ALL)
def test_norms_of_a_batch_of_one(name: str) -> None:
    model, batch = _case(name)
    batch = (batch[0][:1], batch[1][:1])
    torch.testing.assert_close(per_example_norms(model, _one_each, batch), _norms(_one_by_one(model, _one_each, batch)))


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_covers_every_parameter_and_its_parts_add_up_to_each_gradient(name: str) -> None:
    model, batch = _case(name)
    run = ExamplePass(model, _one_each, batch)
    expected = _one_by_one(model, _one_each, batch)
    found = {key: torch.zeros_like(g) for key, g in expected.items()}
    run.visit(lambda key, terms: found[key].add_(terms.gradients(slice(None))))
    assert run.uncovered == []
    torch.testing.assert_close(found, expected)
    squares = {key: g.flatten(1).square().sum(1) for key, g in expected.items() if key in run.captured}
    torch.testing.assert_close(run.squared_norms(), squares)
    weights = torch.randn(len(batch[0]), dtype=torch.float64)
    torch.testing.assert_close(run.weighted_sum(weights), {key: torch.tensordot(weights, g, 1) for key, g in expected.items()})


@pytest.mark.parametrize("name", UNCOVERED)
def test_uses_that_no_layer_explains_are_found_on_the_graph(name: str) -> None:
    model, batch = _case(name)
    names = UNCOVERED[name][1]
    assert ExamplePass(model, _one_each, batch).uncovered == (sorted(trainable(model)) if names is None else names)


@pytest.mark.parametrize("name", ["conv2d", "tied embedding", "attention", "scale"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_gradients_in_any_chunks_are_those_of_one_example_at_a_time(name: str, chunk_size: int | None) -> None:
    model, batch = _case(name)
    found = per_example_gradients(loss_function(model, _one_each), trainable(model), batch, chunk_size=chunk_size)
    torch.testing.assert_close(found, _one_by_one(model, _one_each, batch))


@pytest.mark.parametrize("name", ["linear", "conv2d", "attention, evaluated, time first", "lstm", "unused parameter"])
def test_dots_and_weighted_sums_are_those_of_the_gradients(name: str) -> None:
    model, batch = _case(name)
    gradients = _one_by_one(model, _one_each, batch)
    vector = randn_like(trainable(model), torch.Generator().manual_seed(1))
    expected = torch.stack([dot({key: g[i] for key, g in gradients.items()}, vector) for i in range(N)])
    torch.testing.assert_close(per_example_dots(model, _one_each, batch, vector), expected.detach())
    part = dict(list(vector.items())[:1])
    expected = torch.stack([dot({key: gradients[key][i] for key in part}, part) for i in range(N)])
    torch.testing.assert_close(per_example_dots(model, _one_each, batch, part), expected.detach())
    weights = torch.randn(N, dtype=torch.float64)
    found = per_example_weighted_sum(model, _one_each, batch, weights)
    torch.testing.assert_close(found, {key: torch.tensordot(weights, g, 1) for key, g in gradients.items()})


def test_softmax_regression_has_its_closed_form() -> None:
    """|| (p - y) [x, 1]^T || = ||p - y|| sqrt(||x||^2 + 1)."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(8, 5), torch.randint(3, (8,))
    residual = model(x).softmax(1) - F.one_hot(y, 3)
    expected = residual.norm(dim=1) * (x.square().sum(1) + 1).sqrt()
    found = per_example_norms(model, supervised(nn.CrossEntropyLoss(reduction="none")), (x, y))
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("layer", [
    nn.Conv2d(16, 32, 3, padding="same", dilation=2),
    nn.Conv2d(16, 32, (2, 3), padding="same", bias=False),
    nn.Conv2d(16, 256, 3, stride=2, groups=2),
])  # fmt: skip
def test_large_convolutions_take_their_own_kernel_to_the_same_norms(layer: nn.Conv2d) -> None:
    layer, x = layer.double(), torch.randn(2, 16, 40, 40, dtype=torch.float64)
    batch = (x, torch.zeros_like(layer(x).flatten(1)))
    torch.testing.assert_close(per_example_norms(layer, _one_each, batch), _norms(_one_by_one(layer, _one_each, batch)).detach())


def test_clipping_needs_one_forward_pass() -> None:
    model, batch = _case("conv2d")
    calls = []

    def objective(m: nn.Module, b: Batch) -> Tensor:
        calls.append(len(b[0]))
        return _one_each(m, b)

    run = ExamplePass(model, objective, batch)
    norms = torch.stack(list(run.squared_norms().values())).sum(0).sqrt()
    clipped = run.weighted_sum((0.5 / norms).clamp(max=1))
    assert calls == [1, N]  # the first example alone, then the batch
    gradients = _one_by_one(model, _one_each, batch)
    scale = (0.5 / _norms(gradients)).clamp(max=1)
    torch.testing.assert_close(clipped, {key: torch.tensordot(scale, g, 1) for key, g in gradients.items()})


def test_dropout_keeps_its_mask_and_the_callers_random_numbers() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), (torch.randn(N, 6), torch.randn(N, 3))
    torch.manual_seed(1)
    norms = per_example_norms(model, _one_each, batch)
    after = torch.rand(1)
    torch.manual_seed(1)
    dropped = F.dropout(batch[0], 0.5)
    assert torch.equal(after, torch.rand(1))
    torch.testing.assert_close(norms, per_example_norms(model[1], _one_each, (dropped, batch[1])))


def test_an_empty_batch_has_no_norms_and_zero_sums() -> None:
    model, batch = nn.Linear(3, 2), (torch.randn(0, 3), torch.randn(0, 2))
    assert per_example_norms(model, _one_each, batch).shape == (0,)
    assert per_example_gradients(loss_function(model, _one_each), trainable(model), batch)["weight"].shape == (0, 2, 3)
    assert per_example_dots(model, _one_each, batch, trainable(model)).shape == (0,)
    zeros = {name: torch.zeros_like(p) for name, p in trainable(model).items()}
    assert per_example_weighted_sum(model, _one_each, batch, torch.ones(0)).keys() == zeros.keys()
    torch.testing.assert_close(ExamplePass(model, _one_each, batch).weighted_sum(torch.ones(0)), zeros)


def test_low_precision_sums_are_in_float32() -> None:
    model, batch = _case("linear on sequences", torch.bfloat16)
    norms = per_example_norms(model, _one_each, batch)
    expected = _norms(_one_by_one(model.float(), _one_each, tuple(t.float() for t in batch)))
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, expected.detach(), rtol=0.03, atol=0.01)


def test_autocast_is_seen_through() -> None:
    model, batch = _case("linear on sequences", torch.float32)

    def objective(m: nn.Module, b: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = m(b[0])
        return _one_each(nn.Identity(), (output.float(), b[1]))

    assert ExamplePass(model, objective, batch).uncovered == []
    expected = _norms(_one_by_one(model, _one_each, batch))
    torch.testing.assert_close(per_example_norms(model, objective, batch), expected.detach(), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("model", "shape"), [
    (nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 200)), (64, 200)),
    (nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 200)), (64, 4, 200)),
    (nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3)), (64, 32, 6, 6)),
])  # fmt: skip
def test_norms_do_not_take_the_memory_of_the_gradients(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    batch = (x, torch.randn(model(x).flatten(1).shape))
    with PeakMemory() as ordinary:
        torch.autograd.grad(_one_each(model, batch).sum(), list(model.parameters()))
    with PeakMemory() as norms:
        per_example_norms(model, _one_each, batch)
    gradients = 4 * len(x) * sum(p.numel() for p in model.parameters())
    assert norms.peak < ordinary.peak + 20e6  # the scratch that one chunk may take, twice
    if gradients > 15e6:
        assert norms.peak < 0.7 * gradients + ordinary.peak


def test_batch_statistics_are_refused_by_name() -> None:
    model, batch = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), (torch.randn(N, 3), torch.randn(N, 2))
    vector, weights = trainable(model), torch.ones(N)
    for call in (
        lambda: per_example_norms(model, _one_each, batch),
        lambda: per_example_weighted_sum(model, _one_each, batch, weights),
        lambda: per_example_dots(model, _one_each, batch, vector),
    ):
        with pytest.raises(ValueError, match="BatchNorm1d '1'"):
            call()
    with pytest.raises(ValueError, match="BatchNorm1d '0'"):
        per_example_norms(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval(), _one_each, batch)


def test_examples_that_meet_are_refused() -> None:
    model, batch = nn.Linear(3, 2), (torch.randn(N, 3), torch.randn(N, 2))

    def contrast(m: nn.Module, b: Batch) -> Tensor:
        z = m(b[0])
        return -torch.log_softmax(z @ z.T, 1).diagonal()

    with pytest.raises(ValueError, match=r"first example's loss is .* in the batch but .* alone"):
        per_example_norms(model, contrast, batch)


def test_a_mean_loss_is_refused() -> None:
    model, batch = nn.Linear(3, 2), (torch.randn(N, 3), torch.randn(N, 2))
    mean = supervised(nn.MSELoss())
    for call in (
        lambda: per_example_norms(model, mean, batch),
        lambda: per_example_weighted_sum(model, mean, batch, torch.ones(N)),
        lambda: per_example_dots(model, mean, batch, trainable(model)),
    ):
        with pytest.raises(ValueError, match=r"one loss an example, shape \(4,\), got \(\).*reduction=\"none\""):
            call()


def test_what_does_not_fit_is_named() -> None:
    model, batch = nn.Linear(3, 2), (torch.randn(N, 3), torch.randn(N, 2))
    with pytest.raises(ValueError, match=r"weights .* shape \(4,\), got \(3,\)"):
        per_example_weighted_sum(model, _one_each, batch, torch.ones(3))
    with pytest.raises(ValueError, match=r"\['nothing'\].* no trainable parameters"):
        per_example_dots(model, _one_each, batch, {"nothing": torch.ones(3)})
    with pytest.raises(ValueError, match=r"vector\['bias'\] must have the parameter's shape \(2,\), got \(3,\)"):
        per_example_dots(model, _one_each, batch, {"bias": torch.ones(3)})
    with pytest.raises(ValueError, match="share their first dimension"):
        per_example_norms(model, _one_each, (torch.randn(N, 3), torch.randn(N + 1, 2)))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        per_example_gradients(loss_function(model, _one_each), trainable(model), batch, chunk_size=0)
