"""Seeded perturbations: noise is a function of (seed, name), and a perturbed parameter is a perturbed copy in all but memory."""

import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from gradwise.core.cost import PeakMemory
from gradwise.core.protocols import LazyGradient
from gradwise.core.seeded import PerturbedParameter, SeededGradient, noise, perturb

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
CPU = torch.device("cpu")


def gradient(name: str, terms, shape, dtype=torch.float32, keep: float = 1.0) -> SeededGradient:
    return SeededGradient(name, tuple(terms), torch.Size(shape), dtype, CPU, keep)


# --- noise --------------------------------------------------------------------------------------------------


@given(shape=SHAPES, seed=st.integers(0, 2**63 - 1), name=st.text(max_size=20))
@settings(max_examples=30, deadline=None)
def test_noise_depends_on_seed_and_name_only(shape, seed, name):
    first = noise(seed, name, shape)
    torch.randn(3)
    noise(seed + 1, name, (7,))
    again = noise(seed, name, shape)
    assert first.shape == torch.Size(shape)
    assert torch.equal(first, again)


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise(0, "w", (100,), keep=0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_is_the_same_in_another_process():
    code = "from gradwise.core.seeded import noise; print(noise(12345, 'layer.weight', (4,)).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(noise(12345, "layer.weight", (4,)).tolist())


def test_noise_is_standard_normal_and_independent_between_names_and_seeds():
    n = 2_100_000  # more than two pieces, and no round number
    a, b, c = noise(1, "a", (n,)), noise(1, "b", (n,)), noise(2, "a", (n,))
    bound = 5 / n**0.5
    for x in (a, b, c):
        assert abs(float(x.mean())) < bound
        assert abs(float(x.square().mean()) - 1) < 2**0.5 * bound
        assert abs(float(x.pow(4).mean()) - 3) < 96**0.5 * bound
    for x, y in ((a, b), (a, c), (b, c), (a[: n // 2], a[n // 2 :])):
        assert abs(float((x * y).mean())) < 1.5 * bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_noise_is_the_float32_noise_rounded(dtype):
    assert torch.equal(noise(3, "w", (1_100_000,), dtype), noise(3, "w", (1_100_000,)).to(dtype))


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_mask_keeps_the_stated_share_and_does_not_change_what_it_keeps(keep):
    n = 200_000
    masked, full = noise(5, "w", (n,), keep=keep), noise(5, "w", (n,))
    kept = masked != 0
    # the trap of the reference code: comparing a normal draw with the rate keeps Phi(rate)
    assert abs(float(kept.float().mean()) - keep) < 5 * (keep * (1 - keep) / n) ** 0.5
    assert torch.equal(masked[kept], full[kept])


# --- the lazy gradient --------------------------------------------------------------------------------------


@given(shape=SHAPES, coefficients=st.lists(st.floats(-10, 10), min_size=1, max_size=4), keep=st.sampled_from([1.0, 0.5]))
@settings(max_examples=30, deadline=None)
def test_seeded_gradient_is_the_sum_of_its_terms(shape, coefficients, keep):
    g = gradient("w", enumerate(coefficients), shape, torch.float64, keep)
    expected = sum((c * noise(i, "w", shape, torch.float64, keep=keep) for i, c in enumerate(coefficients)), torch.zeros(shape))
    torch.testing.assert_close(g.materialize(), expected.double())
    torch.testing.assert_close(g.scaled(-3.0).materialize(), -3 * expected.double())
    assert isinstance(g, LazyGradient)
    assert g.wire_bytes == 16 * len(coefficients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", [((1, 0.3),), ((1, 0.3), (2, -1.7), (3, 0.01))])
def test_add_to_steps_by_exactly_alpha_times_the_gradient(dtype, terms):
    start = noise(9, "start", (37, 11), dtype)
    g = gradient("w", terms, (37, 11), dtype)
    stepped = g.add_to_(start.clone(), alpha=-0.1)
    exact = sum(c * noise(s, "w", (37, 11), torch.float32) for s, c in terms)
    assert torch.equal(stepped, (start.float() - 0.1 * exact).to(dtype)) or dtype == torch.float32
    torch.testing.assert_close(stepped, (start.double() - 0.1 * exact.double()).to(dtype))
    if dtype == torch.float32:
        assert torch.equal(stepped, start.clone().add_(g.materialize(), alpha=-0.1))


def test_add_to_a_parameter_in_another_memory_format():
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    g = gradient("w", ((1, 0.5),), weight.shape)
    expected = weight.detach().clone() + 2 * g.materialize()
    torch.testing.assert_close(g.add_to_(weight, alpha=2.0).detach(), expected)


def test_adding_a_large_gradient_needs_no_second_tensor():
    weight = torch.zeros(8_000_000)
    g = gradient("w", ((1, 1.0), (2, 1.0)), weight.shape)
    with PeakMemory() as memory:
        g.add_to_(weight)
    assert memory.peak < 0.6 * weight.nbytes
    assert torch.equal(weight, g.materialize())


def test_any_visiting_order_gives_the_same_gradient():
    shapes = {f"layer{i}.weight": (i + 1, 3) for i in range(6)}
    forward = {n: gradient(n, ((4, 1.0),), s).materialize() for n, s in shapes.items()}
    backward = {n: gradient(n, ((4, 1.0),), s).materialize() for n, s in reversed(shapes.items())}
    assert all(torch.equal(forward[n], backward[n]) for n in shapes)


# --- the perturbed parameter --------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch discourages scripts; models that have them must still be right
    scripted_linear = torch.jit.script(linear)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return scripted_linear(x, self.weight)


class GradientPenalty(nn.Module):
    """A loss that differentiates inside, with respect to its input."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.linear, self.functional = nn.Linear(8, 4), functional

    def forward(self, x: Tensor) -> Tensor:
        def potential(x: Tensor) -> Tensor:
            return self.linear(x).tanh().sum()

        if self.functional:
            return torch.func.vmap(torch.func.grad(potential))(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(potential(x), x, create_graph=True)[0]


ROWS, SEQUENCE, IMAGE = (5, 8), (2, 7, 16), (2, 3, 8, 8)
LAYERS = {
    "Linear": (lambda: nn.Linear(8, 3), ROWS),
    "Bilinear": (lambda: nn.Bilinear(8, 8, 3), (ROWS, ROWS)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 8)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), IMAGE),
    "Conv2d channels_last": (lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), IMAGE),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 3), IMAGE),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), IMAGE),
    "LayerNorm": (lambda: nn.LayerNorm(8), ROWS),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), ROWS),
    "PReLU": (lambda: nn.PReLU(), ROWS),
    "Embedding": (lambda: nn.Embedding(11, 4), None),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(11, 4), None),
    "tied embedding": (Tied, None),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), (SEQUENCE,) * 3),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), SEQUENCE),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True), (SEQUENCE,) * 2),
    "LSTM": (lambda: nn.LSTM(16, 8, 2, bidirectional=True, batch_first=True), SEQUENCE),
    "GRU": (lambda: nn.GRU(16, 8, 2, batch_first=True), SEQUENCE),
    "RNN": (lambda: nn.RNN(16, 8, batch_first=True), SEQUENCE),
    "LSTMCell": (lambda: nn.LSTMCell(8, 4), ROWS),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)), ROWS),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), ROWS),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), ROWS),
    "scripted": (Scripted, ROWS),
    "gradient penalty": (lambda: GradientPenalty(functional=False), ROWS),
    "gradient penalty by vmap": (lambda: GradientPenalty(functional=True), ROWS),
}
NEEDS_FLOAT32 = {"orthogonal": "matrix_exp has no bfloat16 kernel on CPU"}


def inputs_of(shape, dtype) -> tuple[Tensor, ...]:
    if shape is None:
        return (torch.arange(10).view(2, 5),)
    shapes = shape if shape and isinstance(shape[0], tuple) else (shape,)
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def outputs(result) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_perturbed_parameters_equal_perturbed_copies_to_the_bit(layer, dtype, train):
    build, shape = LAYERS[layer]
    if layer in NEEDS_FLOAT32:
        dtype = torch.float32
    torch.manual_seed(0)
    model = build().to(dtype).train(train)
    inputs = inputs_of(shape, dtype)
    params = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in params.items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    copies = {n: (p.float() + 1e-2 * noise(7, n, p.shape)).to(dtype) for n, p in before.items()}
    with torch.no_grad():
        lazy = outputs(functional_call(model, perturb(params, 7, 1e-2), inputs))
        for name, buffer in model.named_buffers():  # batch and spectral normalisation have moved theirs
            buffer.copy_(buffers[name])
        explicit = outputs(functional_call(model, copies, inputs))
        here = outputs(model(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(lazy, explicit, strict=True))
    assert not torch.equal(lazy[0], here[0])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_compiled_model_sees_each_perturbation():
    model = nn.Linear(8, 3)
    compiled = torch.compile(model, backend="eager")
    params, x = dict(compiled.named_parameters()), torch.randn(5, 8)
    with torch.no_grad():
        for seed, scale in ((1, 0.1), (1, -0.1), (2, 0.1)):
            w, b = (params[n] + scale * noise(seed, n, params[n].shape) for n in params)
            assert torch.equal(functional_call(compiled, perturb(params, seed, scale), (x,)), nn.functional.linear(x, w, b))


def test_autocast_sees_each_perturbation():
    model, x = nn.Linear(8, 3), torch.randn(5, 8)
    params = dict(model.named_parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        there, back = (functional_call(model, perturb(params, 1, s), (x,)) for s in (0.1, -0.1))
        copies = {n: p - 0.1 * noise(1, n, p.shape) for n, p in params.items()}
        assert torch.equal(back, functional_call(model, copies, (x,)))
    assert not torch.equal(there, back)


@given(shape=SHAPES, scale=st.floats(-10, 10), keep=st.sampled_from([1.0, 0.3]))
@settings(max_examples=30, deadline=None)
def test_a_perturbed_parameter_looks_like_its_base_and_reads_as_the_sum(shape, scale, keep):
    base = noise(0, "base", shape)
    there = PerturbedParameter(base, "w", 7, scale, keep)
    assert (there.shape, there.dtype, there.device, there.stride()) == (base.shape, base.dtype, base.device, base.stride())
    assert not there.requires_grad
    assert torch.equal(there.clone(), base + scale * noise(7, "w", shape, keep=keep))
    assert torch.equal(there.detach().data + 0, there + 0)
    assert "'w'" in repr(there)


def test_going_there_and_back_does_not_drift_in_bfloat16():
    weight = torch.randn(100, 100, dtype=torch.bfloat16)
    before = weight.clone()
    for seed in range(20):
        for scale in (1e-3, -1e-3):
            perturb({"w": weight}, seed, scale)["w"].sum()
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("model", "largest", "inputs"), [
    (nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]), (256 * 256 + 256) * 4, torch.randn(16, 256)),
    (nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]).bfloat16(), (256 * 256 + 256) * 6, torch.ones(8, 256).bfloat16()),
    (nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64), nn.Linear(64, 500)), (64 * 500 + 500) * 4, torch.arange(8)),
    (nn.Sequential(*[nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)]), (32 * 32 * 9 + 32) * 4, torch.randn(2, 32, 4, 4)),
], ids=["linear", "bfloat16", "embedding", "convolution"])  # fmt: skip
def test_peak_memory_is_a_forward_pass_and_the_largest_operators_parameters(model, largest, inputs):
    params = dict(model.named_parameters())
    with torch.no_grad():
        with PeakMemory() as plain:
            model(inputs)
        with PeakMemory() as perturbed:
            functional_call(model, perturb(params, 1, 1e-3), (inputs,))
        with PeakMemory() as copied:
            functional_call(model, {n: p + 1e-3 * noise(1, n, p.shape, p.dtype) for n, p in params.items()}, (inputs,))
    assert largest // 2 < perturbed.peak <= plain.peak + largest
    assert copied.peak > perturbed.peak


@pytest.mark.parametrize("fused", [True, False])
def test_peak_memory_of_an_encoder_layer_with_and_without_its_fused_kernel(fused):
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True).eval()
    params, x = dict(layer.named_parameters()), torch.randn(1, 4, 64)
    whole, largest = sum(p.nbytes for p in params.values()), 4 * (64 * 256 + 256)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with torch.no_grad():
            with PeakMemory() as plain:
                layer(x)
            with PeakMemory() as perturbed:
                functional_call(layer, perturb(params, 1, 1e-3), (x,))
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert perturbed.peak <= plain.peak + (whole if fused else largest)


# --- bad input ----------------------------------------------------------------------------------------------


def test_writing_into_a_perturbed_parameter_is_refused_by_name():
    there = perturb({"layer.weight": torch.ones(3)}, 1, 0.1)["layer.weight"]
    with pytest.raises(TypeError, match=r"mul_.*layer\.weight"):
        there.mul_(2)
    with pytest.raises(TypeError, match=r"layer\.weight"):
        torch.add(torch.ones(3), 1, out=there)
    renormalised = nn.Embedding(5, 3, max_norm=0.1)  # writes into its weight at each forward pass
    with pytest.raises(TypeError, match="weight"), torch.no_grad():
        functional_call(renormalised, perturb(dict(renormalised.named_parameters()), 1, 1.0), (torch.arange(5),))


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1])
def test_keep_must_be_a_probability(keep):
    for call in (
        lambda: noise(0, "w", (2,), keep=keep),
        lambda: perturb({"w": torch.ones(2)}, 0, 1.0, keep=keep),
        lambda: gradient("w", ((0, 1.0),), (2,), keep=keep),
    ):
        with pytest.raises(ValueError, match=r"keep must be a probability in \(0, 1\], got"):
            call()


def test_integer_parameters_missing_terms_and_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"'steps' has dtype torch\.int64"):
        perturb({"steps": torch.ones(2, dtype=torch.long)}, 0, 1.0)
    with pytest.raises(ValueError, match="'w' needs at least one pair"):
        gradient("w", (), (2,))
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\), the tensor \(3,\)"):
        gradient("w", ((0, 1.0),), (2,)).add_to_(torch.zeros(3))
