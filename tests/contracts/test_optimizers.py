"""What every optimizer must do, run over every `torch.optim.Optimizer` that gradwise.optim exports.

Nothing registers an optimizer here. It is found because it is exported, and built as `cls(params, lr=1e-2, **cls.example)`, where `example` is
an optional class attribute for constructor arguments other than lr that have no default. The tests of modes, state precisions and flat
storage run over those that are made from a rule. There is no list of exemptions.
"""

import copy
import importlib
import inspect
import io
import itertools
import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from gradwise.core.block_quantizer import BLOCK, BlockQuantizer
from gradwise.core.rule_kernel import CHUNK
from gradwise.core.rule_optimizer import SMALL, RuleOptimizer

ROOM = importlib.import_module("gradwise.optim")
FOUND = {c for c in vars(ROOM).values() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer) and not inspect.isabstract(c)}
OPTIMIZERS = sorted(FOUND, key=lambda c: c.__name__)
RULES = [c for c in OPTIMIZERS if issubclass(c, RuleOptimizer)]
every = pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda c: c.__name__)
every_rule = pytest.mark.parametrize("cls", RULES, ids=lambda c: c.__name__)
EAGER = [dict(mode=m, flat=f) for m in ("loop", "foreach") for f in (False, True)]
ids = lambda options: "-".join(f"{k}={v}" for k, v in options.items())  # noqa: E731

# a scalar, vectors, nothing at all, matrices that can and cannot be updated together, a filter bank, single rows and columns
SHAPES = ((5, 3), (7,), (), (0,), (5, 3), (0, 4), (4, 3, 3, 3), (1, 8), (8, 1), (33,), (1,), (20, 16))
STEPS = 4


def build(cls, params, **options):
    return cls(params, **{"lr": 1e-2, **getattr(cls, "example", {}), **options})


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


def set_gradients(params, step, without=()):
    """Gradients that depend on the step alone, with a mean and noise, no two of the same size."""
    g = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = (torch.randn(p.shape, generator=g) + 0.5).to(p.dtype)
        if i in without:
            continue
        if p.grad is None:
            p.grad = grad
        else:
            p.grad.copy_(grad)


def train(optimizer, params, steps=range(STEPS), **kwargs):
    for t in steps:
        optimizer.zero_grad()
        set_gradients(params, t, **kwargs)
        optimizer.step()
    return [p.detach().clone() for p in params]


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def close(a, b, rtol=2e-5, atol=2e-6):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def decoded(cls, optimizer, p):
    """The state tensors of one parameter as float32, whatever they are stored as."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    out = {}
    for name, signed in cls.states_of.__func__(cls, group).items():
        value = state[name]
        out[name] = BlockQuantizer(signed).dequantize(value, state[f"{name}_scale"], p.shape) if f"{name}_scale" in state else value.float()
    return out


def state_bytes(optimizer):
    return sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))


def test_optimizers_are_found():
    assert {"AdaBelief", "Lion", "AdamP", "SGDP"} <= {c.__name__ for c in RULES}


# --- what an optimizer declares ----------------------------------------------------------------------------------------------


@every
def test_the_search_space_names_constructor_arguments_and_lr(cls):
    known = inspect.signature(cls).parameters
    assert "lr" in cls.search_space
    for name, knob in cls.search_space.items():
        assert name in known
        value = knob.values[0] if hasattr(knob, "values") else knob.low
        build(cls, parameters(), **{name: value})


def numeric_arguments(cls):
    """(name, bad value) of every numeric hyper-parameter of the signature."""
    for name, parameter in inspect.signature(cls).parameters.items():
        default = parameter.default
        if name == "lr" or (isinstance(default, int | float) and not isinstance(default, bool)):
            yield from ((name, bad) for bad in (-1.0, math.nan, math.inf, "0.1"))
        elif isinstance(default, tuple):
            for i in range(len(default)):
                for bad in (-0.1, 1.0, math.nan):
                    yield name, (*default[:i], bad, *default[i + 1 :])
            yield from ((name, bad) for bad in (default[:-1], 0.5))


@every
def test_bad_hyper_parameters_are_named(cls):
    cases = list(numeric_arguments(cls))
    assert {"lr"} < {name for name, _ in cases}
    for name, bad in cases:
        with pytest.raises(ValueError, match=name):
            build(cls, parameters(), **{name: bad})


@every
def test_an_unknown_argument_is_refused(cls):
    with pytest.raises(TypeError):
        build(cls, parameters(), learning_rate=0.1)


@every_rule
@pytest.mark.parametrize(("name", "bad"), [("mode", "fast"), ("state", "4bit"), ("min_8bit_size", -1)])
def test_bad_engine_options_are_named(cls, name, bad):
    with pytest.raises(ValueError, match=rf"{name}.*{bad}"):
        build(cls, parameters(), **{name: bad})


@every
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_complex_and_integer_parameters_are_refused_by_name_and_leave_no_trace(cls, dtype):
    bad = torch.zeros(3, dtype=dtype)
    with pytest.raises(ValueError, match=r"second\.weight"):
        build(cls, [("first.weight", nn.Parameter(torch.ones(2))), ("second.weight", bad)])
    good = nn.Parameter(torch.ones(2))
    optimizer = build(cls, [good])
    with pytest.raises(ValueError, match="parameter 0 of group 1"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1
    good.grad = torch.ones(2)
    optimizer.step()


# --- gradients ---------------------------------------------------------------------------------------------------------------


@every
def test_a_sparse_gradient_is_refused_by_name_before_anything_moves(cls):
    dense, sparse = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 2))
    optimizer = build(cls, [{"params": [("dense", dense)]}, {"params": [("embedding", sparse)]}])
    dense.grad, sparse.grad = torch.ones(3), torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse.*embedding"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    assert not dense.grad.is_sparse


@every_rule
@pytest.mark.parametrize("options", EAGER, ids=ids)
def test_none_gradients_leave_the_parameter_and_its_step_count_alone(cls, options):
    params = parameters()
    optimizer = build(cls, params, **options)
    train(optimizer, params, range(2))
    before = [p.detach().clone() for p in params]
    skipped = (0, 1, 6, 9)
    train(optimizer, params, [2], without=skipped)
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        if i in skipped:
            assert torch.equal(p, old)
            assert optimizer.state[p]["step"] == 2
        elif p.numel():
            assert not torch.equal(p, old)
            assert optimizer.state[p]["step"] == 3
    # a late step counts for itself: the same as if the others were not there
    train(optimizer, params, [3])
    alone = parameters()
    for i in skipped:
        lonely = build(cls, [alone[i]], mode="loop")
        for t in (0, 1, 3):
            set_gradients(alone, t)
            lonely.step()
        torch.testing.assert_close(params[i], alone[i])


@every_rule
def test_flat_parameters_without_a_gradient_rest_even_when_gradients_are_clipped(cls):
    used, unused = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4))
    optimizer = build(cls, [used, unused], flat=True)
    (used.sum() + unused.sum()).backward()
    optimizer.step()
    for clip in (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_):
        before = unused.detach().clone()
        optimizer.zero_grad()
        (used * torch.arange(4.0)).sum().backward()
        clip([used, unused], 1.0)  # writes to every gradient there is
        optimizer.step()
        assert torch.equal(unused, before)
        assert optimizer.state[unused]["step"] == 1
    assert optimizer.state[used]["step"] == 3


@every_rule
@pytest.mark.parametrize("clear", ["optimizer", "model", "model to zero", "never"])
def test_flat_gradients_work_with_a_real_backward_and_every_way_of_clearing_them(cls, clear):
    def fit(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = build(cls, model.parameters(), **options)
        x = torch.randn(16, 4)
        for t in range(5):
            if clear == "optimizer":
                optimizer.zero_grad()
            elif clear != "never":
                model.zero_grad(set_to_none=clear == "model")
            out = model[0](x).sum() if t == 2 else model(x)  # in the third step the last layer has no gradient
            out.square().mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()], [optimizer.state[p]["step"] for p in model.parameters()]

    (expected, steps), (got, flat_steps) = fit(mode="loop"), fit(mode="foreach", flat=True)
    close(got, expected)
    assert steps == flat_steps
    assert (steps[-1] == 4) == (clear in ("optimizer", "model"))


@every_rule
@pytest.mark.parametrize("options", EAGER, ids=ids)
def test_zero_gradients_give_no_nan_also_without_eps(cls, options):
    without = {"eps": 0.0} if "eps" in inspect.signature(cls).parameters else {}
    for state, start in itertools.product(("32bit", "8bit"), (torch.ones, torch.zeros)):
        params = [nn.Parameter(start(s)) for s in SHAPES]
        optimizer = build(cls, params, **without, **options, state=state, min_8bit_size=0)
        for t in range(8):
            optimizer.zero_grad()
            for p in params:
                p.grad = torch.zeros_like(p)
                if t > 5 and p.ndim:
                    p.grad[: len(p) // 2] = 1.0
            optimizer.step()
            if t == 5:
                same(params, [start(s) for s in SHAPES])
        assert all(p.isfinite().all() for p in params)
        assert all(v.isfinite().all() for p in params for v in decoded(cls, optimizer, p).values())


@every
def test_gradients_and_parameters_of_any_memory_layout(cls):
    def make(contiguous):
        g = torch.Generator().manual_seed(3)
        values = [
            torch.randn(6, 4, generator=g).t(),
            torch.randn(2, 3, 4, 4, generator=g).to(memory_format=torch.channels_last),
            torch.randn(10, 6, generator=g)[:, ::2],
            torch.randn(5, generator=g),
        ]
        params = [nn.Parameter(v.contiguous().clone() if contiguous else v) for v in values]
        optimizer = build(cls, params)
        for _ in range(3):
            for p in params:
                grad = torch.randn(p.shape, generator=g)
                p.grad = grad if contiguous else grad.transpose(0, -1).contiguous().transpose(0, -1)
            optimizer.step()
        params[0].grad = torch.ones(()).expand(4, 6)  # what sum().backward() leaves
        optimizer.step()
        return params

    strided, plain = make(False), make(True)
    close(strided, plain)
    assert not strided[0].is_contiguous()
    assert strided[1].is_contiguous(memory_format=torch.channels_last)
    assert not strided[2].is_contiguous()


# --- modes agree -------------------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("state", ["32bit", "bf16", "8bit"])
@pytest.mark.parametrize("shapes", [SHAPES, ((SMALL + 5,), (CHUNK + 13,), (181, 200), (3,)), ((3, 5), (4,)) * 60], ids=["mixed", "large", "many"])
def test_eager_modes_agree(cls, state, shapes):
    results = []
    for options in EAGER:
        params = parameters(shapes)
        optimizer = build(cls, params, state=state, min_8bit_size=0, weight_decay=0.1, **options)
        results.append((train(optimizer, params), [decoded(cls, optimizer, p) for p in params if p.numel()]))
    for got, states in results[1:]:
        close(got, results[0][0])
        for a, b in zip(states, results[0][1], strict=True):
            # a value between two codes may be rounded either way
            close(list(a.values()), list(b.values()), **({} if state == "32bit" else dict(rtol=0.05, atol=0.01)))


@every_rule
def test_compiled_agrees_with_the_loop_on_small_and_large_tensors_flat_and_not_and_resumes_to_the_bit(cls):
    shapes = ((20, 16), (33,), (), (0,), (20, 16), (4, 3, 3, 3), (1, 8), (SMALL + 5,))
    params = parameters(shapes)
    optimizer = build(cls, params, mode="loop", weight_decay=0.1)
    expected = train(optimizer, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for flat in (False, True):
            params = parameters(shapes)
            optimizer = build(cls, params, mode="compiled", flat=flat, weight_decay=0.1)
            uninterrupted = train(optimizer, params)
            close(uninterrupted, expected)
            params = parameters(shapes)
            optimizer = build(cls, params, mode="compiled", flat=flat, weight_decay=0.1)
            train(optimizer, params, range(2))
            saved = through_a_file(optimizer.state_dict())
            optimizer = build(cls, params, mode="compiled", flat=False, weight_decay=0.1)
            optimizer.load_state_dict(saved)
            same(train(optimizer, params, range(2, STEPS)), uninterrupted)


@every_rule
def test_compiled_8bit_agrees_with_eager_8bit(cls):
    shapes = ((40, 30), (700,))
    results = []
    for mode in ("foreach", "compiled"):
        params = parameters(shapes)
        optimizer = build(cls, params, mode=mode, state="8bit", min_8bit_size=0)
        results.append((train(optimizer, params, range(2)), [decoded(cls, optimizer, p) for p in params]))
    close(results[1][0], results[0][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        for name in a:
            # the same code nearly everywhere: rounding may turn a value between two codes either way
            assert (a[name] - b[name]).abs().gt(1e-5 * a[name].abs() + 1e-9).float().mean() < 0.01
            torch.testing.assert_close(a[name], b[name], rtol=0.05, atol=0.02)


_WITHOUT_A_COMPILER = """
import os, sys, tempfile, warnings
os.environ["CXX"] = "/no/such/compiler"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
import torch, gradwise.optim
shapes = ((6, 4), (300,), (6, 4), (5, 3), (7,))
for cls in [c for c in vars(gradwise.optim).values() if isinstance(c, type) and c.__name__ in sys.argv[1:]]:
    results = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for mode in ("foreach", "compiled"):
            g = torch.Generator().manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
            optimizer = cls([{"params": params[:2], "lr": 0.02}, {"params": params[2:], "weight_decay": 0.1}], lr=0.01, mode=mode)
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=g)
                optimizer.step()
            results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results)), cls
    print("warnings", sum(issubclass(w.category, RuntimeWarning) and "compiled" in str(w.message) for w in said))
"""


def test_without_a_compiler_compiled_says_so_once_and_gives_the_eager_numbers():
    names = [c.__name__ for c in RULES]
    run = subprocess.run([sys.executable, "-c", _WITHOUT_A_COMPILER, *names], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["warnings", "1", *["warnings", "0"] * (len(RULES) - 1)]


# --- saving and resuming -----------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("state", ["32bit", "bf16", "8bit"])
@pytest.mark.parametrize("options", EAGER, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_save_and_load_in_the_middle_changes_no_bit(cls, options, state, dtype):
    def fresh(params):
        return build(cls, params, state=state, min_8bit_size=64, **options)

    params = parameters(dtype=dtype)
    expected = train(fresh(params), params)
    params = parameters(dtype=dtype)
    first = fresh(params)
    train(first, params, range(2))
    saved, weights = through_a_file(first.state_dict()), through_a_file([p.detach() for p in params])
    resumed = [nn.Parameter(w.clone()) for w in weights]
    optimizer = fresh(resumed)
    optimizer.load_state_dict(saved)
    same(train(optimizer, resumed, range(2, STEPS)), expected)
    # and into an optimizer that has gone on since
    train(first, params, range(2, 5))
    first.load_state_dict(saved)
    with torch.no_grad():
        for p, w in zip(params, weights, strict=True):
            p.copy_(w)
    same(train(first, params, range(2, STEPS)), expected)


@every_rule
@pytest.mark.parametrize("options", EAGER, ids=ids)
def test_loading_the_state_of_a_fresh_optimizer_forgets_everything(cls, options):
    for state, other in itertools.product(("32bit", "8bit"), EAGER):
        params = parameters()
        expected = train(build(cls, params, state=state, min_8bit_size=0, **options), params)
        params = parameters()
        beginning = copy.deepcopy(build(cls, parameters(), state=state, min_8bit_size=0, **other).state_dict())
        optimizer = build(cls, params, state=state, min_8bit_size=0, **options)
        train(optimizer, params, range(7, 10))
        optimizer.load_state_dict(beginning)
        with torch.no_grad():
            for p, start in zip(params, parameters(), strict=True):
                p.copy_(start)
        same(train(optimizer, params), expected)


STORAGES = [dict(state=s, **o) for s, o in zip(("32bit", "8bit", "bf16", "32bit", "8bit"), (*EAGER, EAGER[0]), strict=True)]


@every_rule
@pytest.mark.parametrize(("source", "target"), itertools.permutations(STORAGES, 2), ids=lambda o: "-".join(map(str, o.values())))
def test_resuming_in_any_other_mode_precision_and_storage(cls, source, target):
    params = parameters()
    first = build(cls, params, min_8bit_size=64, weight_decay=0.1, **source)
    train(first, params, range(3))
    saved = through_a_file(first.state_dict())
    before = [decoded(cls, first, p) if p.numel() else {} for p in params]
    # what the next step must be: that of a plain float32 loop that starts from the saved state's values
    plain = [nn.Parameter(p.detach().clone()) for p in params]
    loop = build(cls, plain, mode="loop", weight_decay=0.1)
    train(loop, plain, range(1))
    with torch.no_grad():
        for p, q, values in zip(params, plain, before, strict=True):
            q.copy_(p)
            loop.state[q].update(step=3)
            for name, value in values.items():
                loop.state[q][name].copy_(value)
    expected = train(loop, plain, [3])

    second = build(cls, params, min_8bit_size=64, weight_decay=0.1, **target)
    second.load_state_dict(saved)
    got = train(second, params, [3])
    assert all(second.state[p]["step"] == 4 for p in params)
    assert all(p.isfinite().all() for p in got)
    exact = target["state"] == "32bit" or target["state"] == source["state"]
    if exact:
        close(got, expected)
    else:
        for p, q in zip(params, plain, strict=True):
            for name, value in decoded(cls, second, p).items() if p.numel() else ():
                want = loop.state[q][name]
                assert (value - want).abs().max() <= 0.02 * want.abs().max() + 1e-12
    assert state_bytes(second) == state_bytes(fresh_like(cls, params, target))


def fresh_like(cls, params, target):
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = build(cls, copies, min_8bit_size=64, weight_decay=0.1, **target)
    train(optimizer, copies, range(1))
    return optimizer


@every_rule
def test_deepcopy_continues_alike_and_apart(cls):
    for options in [dict(mode="foreach", flat=f, state=s) for f in (False, True) for s in ("32bit", "8bit")]:
        model = nn.Sequential(nn.Linear(4, 300), nn.Linear(300, 2))
        optimizer = build(cls, model.parameters(), min_8bit_size=0, **options)
        train(optimizer, list(model.parameters()), range(2))
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
        before = [p.detach().clone() for p in model.parameters()]
        ahead = train(twin_optimizer, list(twin.parameters()), range(2, 4))
        same(list(model.parameters()), before)
        same(train(optimizer, list(model.parameters()), range(2, 4)), ahead)


# --- precision and memory ----------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_low_precision_parameters_keep_float32_state_and_float64_ones_float64(cls, dtype, flat):
    params = parameters(dtype=dtype)
    optimizer = build(cls, params, flat=flat, lr=1e-3)
    got = train(optimizer, params, range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for _ in range(2):
        names = [k for k, v in optimizer.state[params[0]].items() if isinstance(v, torch.Tensor)]
        assert names
        assert all(optimizer.state[p][k].dtype == wide for p in params for k in names)
        assert all(p.dtype == dtype for p in params)
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    # one rounding of the parameter a step away from the float32 trajectory
    reference = [nn.Parameter(p.detach().float()) for p in parameters(dtype=dtype)]
    expected = build(cls, reference, lr=1e-3)
    for t in range(2):
        for p, q in zip(reference, parameters(dtype=dtype, seed=0), strict=True):
            p.grad = torch.zeros_like(p, dtype=torch.float32)
            del q
        half = [nn.Parameter(p.detach().to(dtype)) for p in reference]
        set_gradients(half, t)
        for p, q in zip(reference, half, strict=True):
            p.grad.copy_(q.grad)
        expected.step()
    resolution = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-6}[dtype]
    close([p.float() for p in got], [p.detach() for p in reference], rtol=resolution, atol=resolution * 0.1)


@every_rule
def test_bytes_of_state_are_as_declared(cls):
    n = 2**16
    for flat in (False, True):
        for state, each in (("32bit", 4.0), ("bf16", 2.0), ("8bit", 1 + 4 / BLOCK)):
            params = [nn.Parameter(torch.zeros(n // 256, 256)), nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(100))]
            optimizer = build(cls, params, state=state, flat=flat)
            train(optimizer, params, range(1))
            states = len(cls.states_of(optimizer.param_groups[0]))
            small = 100 * (2 if state == "bf16" else 4)  # below min_8bit_size
            assert state_bytes(optimizer) == states * (2 * n * each + small)
            if state == "8bit" and states <= 2:
                assert state_bytes(optimizer) / (2 * n + 100) <= 2.1
            dtypes = {v.dtype for v in optimizer.state[params[0]].values() if isinstance(v, torch.Tensor)}
            assert dtypes == {"32bit": {torch.float32}, "bf16": {torch.bfloat16}, "8bit": {torch.uint8, torch.float32}}[state]


@every_rule
def test_entries_with_a_gradient_that_is_not_finite_rest_under_8bit_state(cls):
    for shape, options in itertools.product([(40, 30), (1200,)], EAGER):
        p = nn.Parameter(torch.ones(shape))
        optimizer = build(cls, [p], state="8bit", min_8bit_size=0, **options)
        train(optimizer, [p], range(2))
        before = p.detach().clone()
        set_gradients([p], 2)
        p.grad.view(-1)[[3, 700]] = torch.tensor([math.inf, math.nan])
        optimizer.step()
        assert torch.equal(p.detach().view(-1)[[3, 700]], before.view(-1)[[3, 700]])
        assert (p.detach() != before).sum() >= 1100 or len(shape) == 2
        assert all(v.isfinite().all() for v in decoded(cls, optimizer, p).values())


# --- the rest of torch's contract --------------------------------------------------------------------------------------------


@every
def test_a_closure_is_evaluated_once_with_gradients_and_its_value_returned(cls):
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer, calls = build(cls, [w]), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert float(loss) == 14.0
    assert calls == [True]
    assert float(w.detach().square().sum()) != 14.0
    assert optimizer.step() is None


@every
def test_groups_have_their_own_hyper_parameters_and_may_come_later(cls):
    a, b, c = parameters(((3, 2), (3, 2), (4,)))
    later = build(cls, [{"params": [a]}, {"params": [b], "lr": 1e-3, "weight_decay": 0.3}], weight_decay=0.1)
    for t in range(3):
        set_gradients([a, b], t)
        later.step()
    later.add_param_group({"params": [c], "lr": 0.05})
    for t in range(3, 5):
        set_gradients([a, b, c], t)
        later.step()
    x, y, z = parameters(((3, 2), (3, 2), (4,)))
    alone = [build(cls, [x], weight_decay=0.1), build(cls, [y], lr=1e-3, weight_decay=0.3), build(cls, [z], lr=0.05, weight_decay=0.1)]
    for t in range(5):
        set_gradients([x, y], t) if t < 3 else set_gradients([x, y, z], t)
        for optimizer in alone if t >= 3 else alone[:2]:
            optimizer.step()
    close([a, b, c], [x, y, z], rtol=1e-6)


@every_rule
def test_groups_come_later_with_flat_storage_too(cls):
    def run(**options):
        params = parameters(((3, 2), (4,), (5, 2)))
        optimizer = build(cls, params[:2], **options)
        train(optimizer, params[:2], range(2))
        optimizer.add_param_group({"params": [params[2]], "lr": 0.05})
        return train(optimizer, params, range(2, 4))

    close(run(mode="foreach", flat=True), run(mode="loop"))


@every
def test_lr_may_be_a_tensor_and_schedulers_set_it(cls):
    results = []
    for lr in (0.02, torch.tensor(0.02, dtype=torch.float64)):
        params = parameters()
        optimizer = build(cls, params, lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
        for t in range(3):
            train(optimizer, params, [t])
            schedule.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.02 / 8)
        results.append([p.detach() for p in params])
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    close(results[0], results[1], rtol=1e-6)
    still = parameters()
    optimizer = build(cls, still, lr=0.0)
    same(train(optimizer, still), parameters())


@every_rule
def test_maximize_is_descent_on_the_negative(cls):
    params, mirrored = parameters(), parameters()
    down, up = build(cls, params, mode="foreach", weight_decay=0.1), build(cls, mirrored, mode="foreach", weight_decay=0.1, maximize=True)
    for t in range(3):
        set_gradients(params, t)
        set_gradients(mirrored, t)
        for p in mirrored:
            p.grad.neg_()
        down.step()
        up.step()
    same(params, mirrored)
    assert float(mirrored[0].grad.sum()) != float(params[0].grad.sum())


@every
def test_gradients_are_read_only(cls):
    params = parameters(((CHUNK + 5,), (181, 200), (3, 2), (4,)))
    optimizer = build(cls, params, weight_decay=0.1, maximize=True, **({"weight_decouple": False} if cls.__name__ == "AdaBelief" else {}))
    set_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    same([p.grad for p in params], before)


@every
def test_named_parameters_and_frozen_ones(cls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    optimizer = build(cls, model.named_parameters())
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [n for n, _ in model.named_parameters()]
    model[0].weight.requires_grad_(True)
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, frozen)


@every
def test_step_hooks_run(cls):
    w, seen = nn.Parameter(torch.ones(2)), []
    optimizer = build(cls, [w])
    optimizer.register_step_pre_hook(lambda *a: seen.append("before"))
    optimizer.register_step_post_hook(lambda *a: seen.append("after"))
    w.grad = torch.ones(2)
    optimizer.step()
    assert seen == ["before", "after"]


@every_rule
@pytest.mark.parametrize("options", EAGER, ids=ids)
def test_autograd_notices_that_the_parameters_were_changed(cls, options):
    w = nn.Parameter(torch.ones(3))
    optimizer = build(cls, [w], **options)
    loss = w.square().sum()
    w.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- flat storage ------------------------------------------------------------------------------------------------------------


@every_rule
def test_flat_storage_refuses_by_name_what_it_cannot_re_home(cls):
    memory = torch.zeros(10)
    cases = {
        "contiguous": torch.zeros(3, 4).t(),
        "view": memory[:4],
        "meta": torch.zeros(3, device="meta"),
        "shared": torch.zeros(3).share_memory_(),
    }
    for reason, bad in cases.items():
        good = nn.Parameter(torch.ones(2))
        address = good.data_ptr()
        with pytest.raises(ValueError, match=rf"block\.weight.*{reason}"):
            build(cls, [("fine", good), ("block.weight", nn.Parameter(bad))], flat=True)
        assert good.data_ptr() == address
        assert good.grad is None
        optimizer = build(cls, [good], flat=True)
        with pytest.raises(ValueError, match=reason):
            optimizer.add_param_group({"params": [nn.Parameter(bad)]})
        assert len(optimizer.param_groups) == 1


@every_rule
def test_flat_storage_refuses_by_name_what_was_frozen_and_cannot_be_re_homed_later(cls):
    late = nn.Parameter(torch.zeros(3, 4).t(), requires_grad=False)
    optimizer = build(cls, [("fine", nn.Parameter(torch.ones(2))), ("late", late)], flat=True)
    late.requires_grad_(True)
    late.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match="late.*contiguous"):
        optimizer.step()


@every_rule
def test_a_model_that_was_moved_after_flat_storage_is_a_clear_error_and_nothing_is_changed(cls):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = build(cls, model.named_parameters(), flat=True)
    model[1].to(torch.float64)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"1\.weight.*flat=True"):
        optimizer.step()
    same(list(model.parameters()), before)
    assert all(s["step"] == 0 for s in optimizer.state.values())


@every_rule
def test_flat_storage_keeps_values_shapes_and_gradients(cls):
    params = parameters()
    set_gradients(params, 0)
    values, grads = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
    optimizer = build(cls, params, flat=True)
    same(params, values)
    same([p.grad for p in params], grads)
    assert all(p.is_leaf and p.requires_grad and p.is_contiguous() for p in params)
    addresses = {p.untyped_storage().data_ptr() for p in params if p.numel() and p.ndim < 2}
    assert len(addresses) == 1
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)


# --- it optimizes ------------------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("state", ["32bit", "bf16", "8bit"])
def test_a_regression_is_learnt_and_8bit_state_costs_at_most_two_percent(cls, state):
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)
    lr = {"Lion": 1e-3, "SGDP": 0.1}.get(cls.__name__, 3e-3)

    def loss_after(state):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = build(cls, model.parameters(), lr=lr, state=state)
        order = torch.Generator().manual_seed(1)
        for _ in range(120):
            batch = torch.randint(len(x), (128,), generator=order)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x), y))

    loss = loss_after(state)
    assert loss < 0.5  # chance is 2.3
    if state != "32bit":
        assert loss <= 1.02 * loss_after("32bit")
