"""The contract of losses/: one suite over everything the room exports, found by the signature of `forward`, with no exemption list.

A loss of (logits, target) and an objective of (model, batch) each have their own half below. A class of another kind makes
`test_every_loss_is_under_a_contract` fail until its kind has a half here too. Each is checked at its defaults and at every
corner of its declared `search_space`, which is also where required arguments take their values from.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradwise import losses
from gradwise.core.protocols import loss_function, trainable
from gradwise.core.search_space import Choice

CLASSES = 5


def exported() -> Iterator[type[nn.Module]]:
    return (value for name, value in sorted(vars(losses).items()) if inspect.isclass(value) and issubclass(value, nn.Module))


def forward_takes(cls: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def corners(cls: type[nn.Module]) -> Iterator[dict[str, Any]]:
    """The defaults, then the defaults with one hyper-parameter at an end (or at each choice) of its range."""
    space = getattr(cls, "search_space", {})
    values = {knob: list(r.values) if isinstance(r, Choice) else [r.low, r.high] for knob, r in space.items()}
    parameters = list(inspect.signature(cls).parameters.values())
    required = {p.name: values[p.name][0] for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    yield required
    yield from ({**required, knob: value} for knob in values for value in values[knob])


LOSSES = [cls for cls in exported() if forward_takes(cls) == ("logits", "target")]
OBJECTIVES = [cls for cls in exported() if forward_takes(cls) == ("model", "batch")]


def cases(classes: list[type[nn.Module]]) -> list[Any]:
    return [
        pytest.param(cls, arguments, id=f"{cls.__name__}({', '.join(f'{k}={v}' for k, v in arguments.items())})")
        for cls in classes
        for arguments in corners(cls)
    ]


each_loss = pytest.mark.parametrize(("cls", "arguments"), cases(LOSSES))
each_objective = pytest.mark.parametrize(("cls", "arguments"), cases(OBJECTIVES))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(seed))


def function_form(cls: type[nn.Module]) -> Callable[..., Tensor]:
    """CompSumLoss -> comp_sum_loss, or comp_sum where the function goes without the suffix."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
    function = getattr(losses, name, None) or getattr(losses, name.removesuffix("_loss"), None)
    assert function is not None, f"{cls.__name__} has no function form: the room exports neither {name} nor the same without _loss"
    return function


def test_every_loss_is_under_a_contract():
    assert LOSSES
    assert OBJECTIVES
    unknown = [cls.__name__ for cls in exported() if cls not in LOSSES + OBJECTIVES]
    assert not unknown, f"no contract covers {unknown}: forward must take (logits, target) or (model, batch), or add its kind here"


# ---- losses of (logits, target) ----


@each_loss
def test_gradcheck(cls, arguments):
    target = labels(4)
    for reduction in ("mean", "sum", "none"):
        loss = cls(**arguments, reduction=reduction)
        logits = normal(4, CLASSES).requires_grad_()
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, target), logits)
    assert torch.autograd.gradgradcheck(lambda z: cls(**arguments)(z, target), normal(4, CLASSES).requires_grad_())


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_finite_at_extreme_logits(cls, arguments, dtype):
    rows = [torch.full((CLASSES,), 1e4), torch.full((CLASSES,), -1e4), torch.zeros(CLASSES)]
    rows += [torch.full((CLASSES,), -s * 1e4).index_fill(0, torch.tensor([k]), s * 1e4) for k in (0, 1) for s in (1, -1)]
    logits = torch.stack(rows).to(dtype).requires_grad_()
    for label in range(2):
        loss = cls(**arguments)(logits, torch.full((len(rows),), label))
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert grad.isfinite().all()


@each_loss
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 6), scale=st.sampled_from([0.1, 1.0, 10.0]), seed=st.integers(0, 99))
def test_reductions_agree(cls, arguments, n, scale, seed):
    logits, target = normal(n, CLASSES, seed=seed) * scale, labels(n, seed=seed)
    each = cls(**arguments, reduction="none")(logits, target)
    assert each.shape == target.shape
    torch.testing.assert_close(cls(**arguments, reduction="sum")(logits, target), each.sum())
    torch.testing.assert_close(cls(**arguments, reduction="mean")(logits, target), each.mean())
    torch.testing.assert_close(cls(**arguments)(logits, target), each.mean())


@each_loss
def test_empty_batch(cls, arguments):
    """Like torch's own losses: nothing sums to 0 and has no mean (NaN); neither is an error."""
    logits, target = torch.zeros(0, CLASSES, requires_grad=True), torch.zeros(0, dtype=torch.long)
    assert cls(**arguments, reduction="none")(logits, target).shape == (0,)
    total = cls(**arguments, reduction="sum")(logits, target)
    total.backward()
    assert total.item() == 0
    assert logits.grad.shape == (0, CLASSES)
    assert cls(**arguments, reduction="mean")(logits, target).isnan()


@each_loss
@pytest.mark.parametrize("shapes", [((3, 5), (4,)), ((3, 5), (3, 2)), ((3, 5, 7), (3, 8)), ((3, 5, 7), (5, 7))], ids=str)
def test_shape_errors_name_both_shapes(cls, arguments, shapes):
    logits, target = shapes
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is looked at below, in any order
        cls(**arguments)(torch.zeros(logits), torch.zeros(target, dtype=torch.long))
    assert str(logits) in str(error.value)
    assert str(target) in str(error.value)


@each_loss
def test_unknown_reduction_is_named_when_made(cls, arguments):
    with pytest.raises(ValueError, match=r"reduction.*'average'"):
        cls(**arguments, reduction="average")


@each_loss
def test_low_precision_is_computed_in_float32(cls, arguments):
    """The loss of bfloat16 logits is that of the same numbers in float32, to float32's own precision; float64 stays float64."""
    logits, target = normal(8, CLASSES), labels(8)
    for dtype in (torch.bfloat16, torch.float16):
        short = logits.to(dtype).requires_grad_()
        loss, exact = cls(**arguments)(short, target), cls(**arguments)(short.detach().double(), target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
        (grad,) = torch.autograd.grad(loss, short)
        assert grad.dtype == dtype
    assert cls(**arguments)(logits, target).dtype == torch.float64


@each_loss
def test_function_form_is_the_module_form(cls, arguments):
    function = function_form(cls)
    for reduction in ("mean", "sum", "none"):
        logits, target = normal(6, CLASSES), labels(6)
        module = cls(**arguments, reduction=reduction)(logits, target)
        assert torch.equal(function(logits, target, **arguments, reduction=reduction), module)


@each_loss
def test_torch_func_gives_the_gradient_of_each_example(cls, arguments):
    logits, target, loss = normal(6, CLASSES), labels(6), cls(**arguments, reduction="sum")

    def one(z: Tensor, y: Tensor) -> Tensor:
        return loss(z.unsqueeze(0), y.unsqueeze(0))

    rows = logits.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(one(row, y), row)[0] for row, y in zip(rows.unbind(), target, strict=True)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(one))(logits, target), expected)


@each_loss
def test_compiles_into_one_graph(cls, arguments):
    torch.compiler.reset()
    loss = cls(**arguments)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for n in (6, 9):  # another batch size must not need another answer
        ours, theirs = (normal(n, CLASSES, dtype=torch.float32).requires_grad_() for _ in range(2))
        value, expected = compiled(ours, labels(n)), loss(theirs, labels(n))
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, ours), torch.autograd.grad(expected, theirs))


@each_loss
def test_inputs_are_left_alone_and_nothing_is_remembered(cls, arguments):
    loss, logits, target = cls(**arguments), normal(6, CLASSES), labels(6)
    before = logits.clone(), target.clone()
    first = loss(logits, target)
    loss(normal(3, CLASSES, seed=9), labels(3))
    assert torch.equal(loss(logits, target), first)
    assert torch.equal(logits, before[0])
    assert torch.equal(target, before[1])


@each_loss
def test_is_minimised_by_the_right_answer(cls, arguments):
    """A loss to descend: its negative gradient raises the label's score, and the right answer costs less than a wrong one."""
    logits, target = normal(20, CLASSES).requires_grad_(), labels(20)
    loss = cls(**arguments, reduction="sum")
    (grad,) = torch.autograd.grad(loss(logits, target), logits)
    assert (grad.gather(1, target.unsqueeze(1)) < 0).all()
    right = 3.0 * nn.functional.one_hot(target, CLASSES).double()
    assert loss(right, target) < loss(-right, target)


# ---- objectives of (model, batch) ----


class Classifier(nn.Module):
    """A small net with everything that evaluation mode changes: batch normalisation, dropout, and a part that its owner froze."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, CLASSES))
        self.frozen = nn.BatchNorm1d(CLASSES)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(normal(*p.shape, seed=i, dtype=torch.float32) * 0.5)
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.body(x))


def example(n: int = 8) -> tuple[Tensor, Tensor]:
    return normal(n, 6, dtype=torch.float32), labels(n)


def seeded(cls: type[nn.Module], arguments: dict[str, Any], seed: int = 0, **more: Any) -> nn.Module:
    return cls(**arguments, **more, generator=torch.Generator().manual_seed(seed))


@each_objective
def test_objective_is_a_finite_scalar_whose_gradient_reaches_every_parameter(cls, arguments):
    model, (x, y) = Classifier(), example()
    for scale in (1.0, 1e4):
        loss = seeded(cls, arguments)(model, (x * scale, y))
        model.zero_grad()
        loss.backward()
        assert loss.shape == ()
        assert loss.isfinite()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
        assert sum(p.grad.abs().sum() for p in model.parameters()) > 0


@each_objective
def test_objective_is_finite_in_bfloat16(cls, arguments):
    model, (x, y) = Classifier().bfloat16(), example()
    loss = seeded(cls, arguments)(model, (x.bfloat16(), y))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@each_objective
def test_objective_leaves_modes_inputs_and_gradients_as_they_were(cls, arguments):
    for training in (True, False):
        model, (x, y) = Classifier(), example()
        model.body.train(training)
        modes = [module.training for module in model.modules()]
        before = x.clone()
        seeded(cls, arguments)(model, (x, y))
        assert [module.training for module in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(x, before)
        assert x.grad is None
        assert not x.requires_grad


@each_objective
def test_objective_restores_modes_when_the_model_fails(cls, arguments):
    class Fails(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            if not self.body.training:
                raise RuntimeError("only trains")
            return super().forward(x)

    model = Fails()
    with pytest.raises(RuntimeError, match="only trains"):
        seeded(cls, arguments)(model, example())
    assert model.body.training


@each_objective
def test_objective_is_reproducible_from_its_generator_alone(cls, arguments):
    model = Classifier(dropout=0.0).eval()
    values = []
    for global_seed in (0, 1):  # must not matter
        torch.manual_seed(global_seed)
        values.append(seeded(cls, arguments)(model, example()).item())
    assert values[0] == values[1]
    state = torch.get_rng_state()
    seeded(cls, arguments)(model, example())
    assert torch.equal(torch.get_rng_state(), state)


@each_objective
def test_objective_at_radius_zero_is_a_loss_of_the_clean_scores(cls, arguments):
    """Radius 0 leaves one evaluation of the model, at the batch itself, and no randomness."""
    seen: list[Tensor] = []

    class Watched(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    model, (x, y) = Watched(dropout=0.0), example()
    clean = seeded(cls, arguments, 0, gamma=0.0)(model, (x, y))
    assert len(seen) == 1
    assert seen[0] is x
    assert torch.equal(seeded(cls, arguments, 1, gamma=0.0)(model, (x, y)), clean)
    assert seeded(cls, arguments, 0, gamma=0.1)(model, (x, y)) > clean


@each_objective
def test_objective_is_pure_in_the_parameters(cls, arguments):
    """By `torch.func` and by autograd the same gradient, and at other parameters another value, without touching the model."""
    model, batch = Classifier(dropout=0.0).eval(), example()
    params = {name: p.detach() for name, p in trainable(model).items()}
    evaluate = loss_function(model, seeded(cls, arguments))
    functional = torch.func.grad(evaluate)(params, batch)
    seeded(cls, arguments)(model, batch).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(functional[name], p.grad, msg=lambda text, name=name: f"{name}: {text}")
    elsewhere = {name: p * 0.5 for name, p in params.items()}
    assert evaluate(elsewhere, batch) != evaluate(params, batch)
    assert all(torch.equal(p, params[name]) for name, p in model.named_parameters())


@each_objective
def test_objective_evaluates_without_gradients(cls, arguments):
    """Zeroth-order estimators ask only for the value."""
    model, batch = Classifier(dropout=0.0).eval(), example()
    expected = seeded(cls, arguments)(model, batch)
    with torch.no_grad():
        value = seeded(cls, arguments)(model, batch)
    assert not value.requires_grad
    assert torch.equal(value, expected)


@each_objective
def test_objective_refuses_other_batches(cls, arguments):
    x, y = example()
    with pytest.raises(TypeError, match="Tensor"):
        cls(**arguments)(Classifier(), x)
    with pytest.raises(ValueError, match=r"\(8, 5\).*\(7,\)"):
        cls(**arguments)(Classifier(), (x, y[:7]))


@each_objective
def test_function_form_is_the_objective_form(cls, arguments):
    function, model, (x, y) = function_form(cls), Classifier(dropout=0.0).eval(), example()
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(function(model, x, y, **arguments, generator=generator), seeded(cls, arguments)(model, (x, y)))


@each_objective
def test_objective_resumes_its_random_stream(cls, arguments):
    model, batch = Classifier(dropout=0.0).eval(), example()
    objective = seeded(cls, arguments)
    objective(model, batch)
    state = copy.deepcopy(objective.state_dict())
    resumed = seeded(cls, arguments, seed=77)
    resumed.load_state_dict(state)
    assert resumed(model, batch).item() == objective(model, batch).item()
