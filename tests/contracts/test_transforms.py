"""What every transform must do, run over every class with the seam's four methods that any room exports.

Nothing registers a transform here. It is found because it is exported, and it is built as `cls(**cls.example)`: `example` is
the class attribute that holds the constructor's arguments without a default (see `gradwise.core.transform.GradientTransform`).
A transform whose `example` does not build it fails; there is no list of exemptions.
"""

import importlib
import inspect
import io
import math

import pytest
import torch
from torch import nn

from gradwise.core.compat import IncompatibleWords
from gradwise.core.named_tensors import dense
from gradwise.core.protocols import Transform, names_of
from gradwise.core.rooms import existing_rooms
from gradwise.core.seeded import SeededGradient
from gradwise.core.transform import GradientTransform
from gradwise.optim import AdaBelief


def exported_classes():
    for room in existing_rooms():
        for value in vars(importlib.import_module(f"gradwise.{room}")).values():
            if inspect.isclass(value):
                yield value


FOUND = {c for c in exported_classes() if issubclass(c, Transform) and not inspect.isabstract(c)}
TRANSFORMS = sorted(FOUND, key=lambda c: c.__name__)
every = pytest.mark.parametrize("cls", TRANSFORMS, ids=lambda c: c.__name__)


def build(cls):
    return cls(**getattr(cls, "example", {}))


def gradient(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"first.weight": (5, 3), "first.bias": (5,), "gain": (), "empty": (0, 2), "column": (4, 1)}
    return {name: (2.0 * torch.randn(shape, generator=g)).to(dtype) for name, shape in shapes.items()}


def like(grads):
    return {name: torch.ones(g.shape, dtype=g.dtype) for name, g in grads.items()}


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(dense(a[name]), dense(b[name]), rtol=0, atol=0)


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


class Model(nn.Module):
    """Parameters of many shapes, one that is never used and one that is frozen."""

    def __init__(self):
        super().__init__()
        for name, value in gradient(1).items():
            setattr(self, name.replace(".", "_"), nn.Parameter(value))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        used = [p for name, p in self.named_parameters() if name not in ("unused", "frozen")]
        return x * sum((p * (i + 1)).square().sum() for i, p in enumerate(used)) + self.frozen.sum()


def explicitly(transform, optimizer):
    """What attaching must amount to: the transform called on the gradients of trainable parameters, under their readable names."""
    names = names_of(optimizer)
    live = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    for name, g in transform({name: p.grad for name, p in live.items() if p.grad is not None}, live).items():
        live[name].grad = dense(g)


def test_transforms_are_found():
    assert {"ClipNorm", "GradientNoise"} <= {c.__name__ for c in TRANSFORMS}
    room = importlib.import_module("gradwise.transforms")
    attachable = {c for c in vars(room).values() if inspect.isclass(c) and hasattr(c, "attach") and not inspect.isabstract(c)}
    assert attachable <= set(TRANSFORMS), "a transform lacks __call__, attach, state_dict or load_state_dict"


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_new_gradients_under_the_same_names_and_the_inputs_unchanged(cls, dtype):
    grads, params = gradient(dtype=dtype), like(gradient(dtype=dtype))
    before, versions = {name: g.clone() for name, g in grads.items()}, {name: g._version for name, g in grads.items()}
    out = build(cls)(grads, params)
    assert list(out) == list(grads)
    for name, g in grads.items():
        new = dense(out[name])
        assert (new.shape, new.dtype, new.device) == (g.shape, g.dtype, g.device)
        assert new.isfinite().all()
        assert not new.requires_grad
        assert new is not g, f"{name}: a caller that writes into the result would write into the input"
        assert torch.equal(g, before[name])
        assert g._version == versions[name]
    assert all(torch.equal(p, torch.ones_like(p)) for p in params.values())


@every
def test_a_gradient_without_tensors_stays_empty(cls):
    assert build(cls)({}, {}) == {}


@every
def test_the_same_construction_gives_the_same_gradients(cls):
    torch.manual_seed(0)
    first = build(cls)(gradient(), like(gradient()))
    state = torch.get_rng_state()
    same(first, build(cls)(gradient(), like(gradient())))
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator was used"


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lazy_gradients_are_accepted_and_mean_their_tensors(cls, dtype):
    lazy = {
        name: SeededGradient(name, ((3, 2.0), (5, -1.0)), torch.Size(shape), dtype, torch.device("cpu"))
        for name, shape in {"w": (6, 2), "b": (6,)}.items()
    }
    tensors = {name: g.materialize() for name, g in lazy.items()}
    mixed, expected = build(cls)({**lazy, **gradient(dtype=dtype)}, {}), build(cls)({**tensors, **gradient(dtype=dtype)}, {})
    for name, g in expected.items():
        torch.testing.assert_close(dense(mixed[name]), g)


@every
def test_a_sparse_gradient_is_refused_by_name(cls):
    sparse = torch.eye(3).to_sparse()
    transform = build(cls)
    before = transform.state_dict()
    with pytest.raises(ValueError, match=r"embedding\.weight.*sparse"):
        transform({"embedding.weight": sparse}, {})
    assert str(transform.state_dict()) == str(before), "a refused gradient must not count as a step"


@every
@pytest.mark.parametrize("at", [0, 1, 3])
def test_state_resumes_exactly_in_the_middle(cls, at):
    whole, cut = build(cls), build(cls)
    for t in range(at):
        whole(gradient(t), like(gradient(t)))
        cut(gradient(t), like(gradient(t)))
    state = cut.state_dict()
    kept = saved_and_loaded(state)
    cut(gradient(99), like(gradient(99)))  # going on must not change what was saved
    for source in (kept, state):
        resumed = build(cls)
        resumed(gradient(50), like(gradient(50)))  # whatever it did before is forgotten
        resumed.load_state_dict(source)
        reference = build(cls)
        for t in range(at):
            reference(gradient(t), like(gradient(t)))
        for t in range(at, at + 3):
            same(resumed(gradient(t), like(gradient(t))), reference(gradient(t), like(gradient(t))))


@every
def test_a_state_of_something_else_is_refused(cls):
    with pytest.raises(ValueError, match="surprise"):
        build(cls).load_state_dict({"surprise": 1})


@every
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("closure", ["none", "argument", "keyword"])
def test_attaching_is_calling(cls, named, closure):
    attached, called = Model(), Model()
    optimizers = [torch.optim.Adam(m.named_parameters() if named else m.parameters(), lr=0.1) for m in (attached, called)]
    handle, transform = build(cls).attach(optimizers[0]), build(cls)

    def evaluate(model, optimizer):
        optimizer.zero_grad()
        loss = model(torch.ones(()))
        loss.backward()
        return loss

    for step in range(4):
        if step == 3:
            handle.remove()
        if closure == "none":
            evaluate(attached, optimizers[0])
            optimizers[0].step()
        elif closure == "argument":
            loss = optimizers[0].step(lambda: evaluate(attached, optimizers[0]))
        else:
            loss = optimizers[0].step(closure=lambda: evaluate(attached, optimizers[0]))
        expected = evaluate(called, optimizers[1])
        assert closure == "none" or float(loss.detach()) == float(expected.detach())
        if step < 3:
            explicitly(transform, optimizers[1])
        optimizers[1].step()
        same(dict(attached.named_parameters()), dict(called.named_parameters()))


@every
def test_attached_it_leaves_missing_and_frozen_gradients_alone(cls):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    build(cls).attach(optimizer)
    model(torch.ones(())).backward()
    stale = model.frozen.grad = torch.full((3,), 7.0)
    optimizer.step()
    assert model.unused.grad is None
    assert torch.equal(model.unused, torch.ones(3))
    assert torch.equal(stale, torch.full((3,), 7.0))
    optimizer.zero_grad()
    optimizer.step()  # no gradient at all
    assert all(p.grad is None for p in model.parameters())


@every
def test_attached_to_flat_storage_it_leaves_cleared_gradients_alone(cls):
    model = Model()
    optimizer = AdaBelief([p for p in model.parameters() if p.requires_grad], lr=0.1, flat=True)
    build(cls).attach(optimizer)
    unused = model.unused.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model.first_weight.square().sum().backward()
        optimizer.step()
    assert torch.equal(model.unused, unused)
    assert optimizer.state[model.unused].get("step", 0) == 0


@every
def test_attached_it_writes_into_the_gradients_that_are_there(cls):
    model = nn.Linear(3, 2)
    buffer = torch.linspace(-3, 3, 8)
    model.weight.grad, model.bias.grad = buffer[:6].view(2, 3), buffer[6:]
    expected = build(cls)({"weight": model.weight.grad.clone(), "bias": model.bias.grad.clone()}, dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    build(cls).attach(optimizer)
    optimizer.step()
    assert model.weight.grad.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(buffer, torch.cat([expected["weight"].flatten(), expected["bias"]]), rtol=0, atol=0)


@every
def test_two_groups_may_hold_the_same_names(cls):
    models = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.SGD([{"params": list(m.named_parameters())} for m in models], lr=0.0)
    build(cls).attach(optimizer)
    grads = {}
    for i, model in enumerate(models):
        for j, p in enumerate(model.parameters()):
            p.grad = torch.full(p.shape, 3.0)
            grads[f"{i}{j}"] = p.grad.clone()
    optimizer.step()
    for new, p in zip(build(cls)(grads, {}).values(), [p for m in models for p in m.parameters()], strict=True):
        torch.testing.assert_close(p.grad, new, rtol=0, atol=0)


@every
def test_every_evaluation_of_a_line_search_is_transformed_or_the_pair_is_refused(cls):
    w = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.LBFGS([w], lr=0.1, max_iter=3)
    transform, seen, given = build(cls), [], []
    try:
        transform.attach(optimizer)
    except IncompatibleWords as refused:
        assert cls.__name__ in str(refused)  # noqa: PT017  (either outcome is right)
        return

    class Spy(GradientTransform):
        def plan(self, grads, params):
            seen.append(grads["parameter 0 of group 0"].clone())
            return lambda name, grad: grad.clone()

    def closure():
        optimizer.zero_grad()
        loss = 10 * w.square().sum()
        loss.backward()
        given.append(w.grad.clone())
        return loss

    Spy().attach(optimizer)
    optimizer.step(closure)
    assert len(given) > 1
    reference = build(cls)
    for raw, transformed in zip(given, seen, strict=True):
        torch.testing.assert_close(transformed, reference({"w": raw}, {})["w"], rtol=0, atol=0)


@every
def test_gradients_that_a_scaler_left_scaled_are_refused(cls):
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    build(cls).attach(optimizer)
    w.grad = torch.ones(2)
    optimizer.grad_scale = torch.tensor(1024.0)  # as GradScaler.step hands it to an optimizer that unscales by itself
    with pytest.raises(RuntimeError, match="unscale_"):
        optimizer.step()


@every
def test_numbers_that_are_not_numbers_are_named(cls):
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if str(parameter.annotation) in ("int", "float"):
            with pytest.raises((ValueError, TypeError), match=name):
                cls(**{**getattr(cls, "example", {}), name: math.nan})
