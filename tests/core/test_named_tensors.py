"""Arithmetic on dictionaries of tensors: each function against the same thing done on one flat float64 vector."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwise.core import named_tensors as nt
from gradwise.core.cost import PeakMemory
from gradwise.core.seeded import SeededGradient

shapes = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6), st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5
)


def draw(shapes, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in shapes.items()}


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(-3, 3))
def test_everything_agrees_with_one_flat_vector(shapes, number):
    a, b = draw(shapes, 1), draw(shapes, 2)
    x, y = nt.flatten(a), nt.flatten(b)
    torch.testing.assert_close(nt.flatten(nt.add(a, b, alpha=number)), x + number * y)
    torch.testing.assert_close(nt.flatten(nt.scale(a, number)), number * x)
    torch.testing.assert_close(nt.dot(a, b), (x * y).sum())
    for order in (1.0, 2.0, 3.0):
        torch.testing.assert_close(nt.norm(a, order).double(), x.abs().pow(order).sum() ** (1 / order))
    torch.testing.assert_close(nt.norm(a, math.inf).double(), x.abs().amax() if x.numel() else torch.tensor(0.0).double())
    assert list(nt.unflatten(x, a)) == list(a)
    for name, piece in nt.unflatten(x, a).items():
        assert torch.equal(piece, a[name])
    assert not nt.flatten(nt.zeros_like(a)).any()


def test_names_keep_their_order_and_inputs_are_not_written():
    a, b = draw({"z": (2,), "a": (3,)}, 1), draw({"z": (2,), "a": (3,)}, 2)
    before = {n: x.clone() for n, x in a.items()}
    for out in (nt.add(a, b), nt.scale(a, 2.0), nt.zeros_like(a), nt.randn_like(a)):
        assert list(out) == ["z", "a"]
        assert all(out[n] is not a[n] for n in a)
    assert all(torch.equal(a[n], before[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype):
    x = {"w": torch.full((300, 300), 0.1, dtype=dtype), "b": torch.ones(10)}
    exact = sum(float(t.double().square().sum()) for t in x.values())
    assert nt.norm(x).dtype == torch.float32
    assert float(nt.norm(x)) == pytest.approx(math.sqrt(exact), rel=1e-3)
    assert float(nt.dot(x, x)) == pytest.approx(exact, rel=1e-3)
    large = {"w": torch.full((4,), 6e4, dtype=torch.float16)}
    assert float(nt.norm(large)) == pytest.approx(1.2e5, rel=1e-2), "the square of 6e4 is infinite in float16"


def test_lazy_gradients_stay_lazy_under_scaling_and_are_normed_one_at_a_time():
    sizes = {name: torch.Size([200_000]) for name in "abcdef"}
    lazy = {n: SeededGradient(n, ((3, 2.0),), shape, torch.float32, torch.device("cpu")) for n, shape in sizes.items()}
    tensors = {n: nt.dense(g) for n, g in lazy.items()}
    scaled = nt.scale(lazy, -0.5)
    assert all(isinstance(g, SeededGradient) for g in scaled.values())
    assert all(torch.equal(nt.dense(scaled[n]), -0.5 * tensors[n]) for n in lazy)
    with PeakMemory() as memory:
        norm = nt.norm(lazy)
    torch.testing.assert_close(norm, nt.norm(tensors))
    assert memory.peak < 3 * 4 * 200_000
    assert nt.dense(tensors["a"]) is tensors["a"]


def test_the_norm_of_sparse_gradients_is_that_of_their_sums():
    table = torch.nn.Embedding(10, 2, sparse=True)
    table(torch.tensor([3, 3, 7])).sum().backward()  # row 3 is met twice
    grads = {"table": table.weight.grad, "w": torch.ones(4)}
    assert float(nt.norm(grads)) == pytest.approx(math.sqrt(2 * 4 + 2 * 1 + 4))
    assert float(nt.norm(grads, math.inf)) == 2


def test_what_is_empty_has_norm_and_product_zero():
    assert float(nt.norm({})) == float(nt.dot({}, {})) == 0
    assert float(nt.norm({"e": torch.empty(0, 3)}, math.inf)) == 0
    assert nt.flatten({}).shape == (0,)


def test_nan_and_infinity_are_not_hidden():
    assert math.isnan(nt.norm({"a": torch.tensor([math.nan]), "b": torch.ones(2)}))
    assert math.isinf(nt.norm({"a": torch.tensor([-math.inf]), "b": torch.ones(2)}))


def test_random_entries_come_from_the_generator_alone():
    like = {"a": torch.zeros(1000, dtype=torch.bfloat16), "b": torch.zeros(3, 4)}
    state = torch.get_rng_state()
    first, again = (nt.randn_like(like, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for name, x in like.items():
        assert torch.equal(first[name], again[name])
        assert (first[name].shape, first[name].dtype) == (x.shape, x.dtype)
    assert float(first["a"].float().std()) == pytest.approx(1.0, abs=0.1)


def test_what_does_not_match_is_named():
    for function in (nt.add, nt.dot, nt.same_names):
        with pytest.raises(ValueError, match=r"only in the first \['left'\], only in the second \['right'\]"):
            function({"left": torch.ones(1), "w": torch.ones(1)}, {"right": torch.ones(1), "w": torch.ones(1)})
    with pytest.raises(ValueError, match=r"shape \(5,\) to be cut into 2 tensors, got \(4,\)"):
        nt.unflatten(torch.zeros(4), {"a": torch.zeros(2), "b": torch.zeros(3)})
