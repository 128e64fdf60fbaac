"""What a step costs: counts against loops that count for themselves, bytes against sizes written out by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradwise.core.cost import CostMeter, PeakMemory, gradient_bytes, tensor_bytes
from gradwise.core.protocols import loss_function
from gradwise.core.seeded import SeededGradient


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def counts(objective, *, backward=True, model=None):
    meter, model = CostMeter(), network() if model is None else model
    loss = meter.counted(objective)(model, torch.randn(6, 4))
    if backward:
        loss.backward()
    return meter.forwards, meter.backwards


# --- passes -----------------------------------------------------------------------------------------------------------------------


def test_one_evaluation_is_one_pass_and_a_backward_only_when_it_runs():
    assert counts(lambda m, x: m(x).mean()) == (1, 1)
    assert counts(lambda m, x: m(x).mean(), backward=False) == (1, 0)
    with torch.no_grad():
        assert counts(lambda m, x: m(x).mean(), backward=False) == (1, 0)


def test_every_call_of_the_model_counts():
    assert counts(lambda m, x: (m(x) - m(-x)).square().mean()) == (2, 2)
    assert counts(lambda m, x: (m(x) - m(-x).detach()).square().mean()) == (2, 1)


def test_a_gradient_penalty_counts_its_backward_pass_inside():
    def objective(m, x):
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return slope.square().sum()

    assert counts(objective) == (1, 2)  # towards x, and then back through that pass towards the parameters


def test_an_objective_that_never_calls_the_model_as_a_whole_is_one_pass():
    assert counts(lambda m, x: m[0](x).square().mean()) == (1, 1)
    assert counts(lambda m, x: sum(p.square().sum() for p in m.parameters())) == (1, 1)


def test_a_model_with_several_outputs_is_gone_through_once():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x):
            return {"a": self.a(x), "rest": (self.b(x), 3)}

    def objective(m, x):
        out = m(x)
        return out["a"].mean() + out["rest"][0].mean()

    assert counts(objective, model=Heads()) == (1, 1)


def test_two_backward_passes_through_one_result_are_two():
    meter, model = CostMeter(), network()
    loss = meter.counted(lambda m, x: m(x).mean())(model, torch.randn(6, 4))
    loss.backward(retain_graph=True)
    loss.backward()
    assert (meter.forwards, meter.backwards) == (1, 2)


def test_functional_evaluations_and_function_transforms_count():
    model, meter = network(), CostMeter()
    f = loss_function(model, meter.counted(lambda m, x: m(x).mean()))
    params = {n: p.detach() for n, p in model.named_parameters()}
    f(params, torch.randn(6, 4))
    torch.func.grad(f)(params, torch.randn(6, 4))
    assert (meter.forwards, meter.backwards) == (2, 1)
    torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))(params, torch.randn(6, 1, 4))  # all examples in one pass
    assert (meter.forwards, meter.backwards) == (3, 2)


def test_recomputed_blocks_and_compiled_and_scripted_models_are_one_pass():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    assert counts(lambda m, x: m(x).mean(), model=Checkpointed()) == (1, 1)
    compiled = torch.compile(network(), backend="eager")
    for _ in range(2):
        assert counts(lambda m, x: m(x).mean(), model=compiled) == (1, 1)
    assert counts(lambda m, x: m(x).mean(), model=torch.jit.script(network())) == (1, 1)


def test_counting_leaves_the_model_as_it_was():
    model = network()

    def fails(m, x):
        m(x)
        raise RuntimeError("as user code may")

    counts(lambda m, x: m(x).mean(), model=model)
    with pytest.raises(RuntimeError, match="as user code may"):
        counts(fails, model=model)
    assert not model._forward_hooks


# --- bytes ------------------------------------------------------------------------------------------------------------------------


def seeded(name, shape, *terms):
    return SeededGradient(name, terms, torch.Size(shape), torch.float32, torch.device("cpu"))


def test_a_dense_gradient_sends_every_entry_in_its_dtype():
    grads = {"a": torch.zeros(10, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros((), dtype=torch.float64)}
    assert gradient_bytes(grads) == 120 + 10 + 8
    assert gradient_bytes({}) == 0


def test_a_seeded_gradient_sends_its_pairs_once_however_many_tensors_share_them():
    pair, other = (7, 0.5), (8, -1.0)
    assert gradient_bytes({n: seeded(n, (1000, 1000), pair) for n in "abcdef"}) == 16
    assert gradient_bytes({n: seeded(n, (1000,), pair, other) for n in "abcdef"}) == 32
    assert gradient_bytes({"a": seeded("a", (9,), pair), "b": seeded("b", (9,), other), "c": torch.zeros(2)}) == 16 + 16 + 8
    clipped = {n: seeded(n, (9,), pair).scaled(0.1) for n in "ab"}  # one factor for all keeps it one message
    assert gradient_bytes(clipped) == 16


def test_other_lazy_gradients_send_what_they_say_each():
    class LowRank:
        shape, dtype, device, wire_bytes = torch.Size([8, 8]), torch.float32, torch.device("cpu"), 64

    assert gradient_bytes({"a": LowRank(), "b": LowRank()}) == 128


def test_a_sparse_gradient_sends_the_rows_it_touches():
    table = nn.Embedding(1000, 3, sparse=True)
    table(torch.tensor([4, 9, 4])).sum().backward()
    assert gradient_bytes({"table": table.weight.grad}) == 2 * 8 + 2 * 3 * 4


def test_tensor_bytes_counts_each_tensor_once_wherever_it_hides():
    x = torch.zeros(10)
    assert tensor_bytes({"a": x, "b": [x, (torch.zeros(2, dtype=torch.uint8),)], "step": 3, "name": "adam", "none": None}) == 42
    buffer = torch.zeros(100)
    assert tensor_bytes([buffer[:10], buffer[10:30], buffer[:10]]) == 120
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(50)), frozen := nn.Parameter(torch.zeros(5), requires_grad=False)])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(50)
    optimizer.step()
    assert frozen not in optimizer.state
    assert tensor_bytes(optimizer.state) == 2 * 200 + 4  # two moments and a float32 counter


# --- memory -----------------------------------------------------------------------------------------------------------------------


def test_the_peak_is_of_what_lives_at_once():
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b * 2
        del b, c
        torch.zeros(10)
    assert memory.peak == 8000
    assert memory.live == 0


def test_views_and_writes_in_place_cost_nothing_and_what_was_there_before_does_not_count():
    before = torch.ones(1000)
    with PeakMemory() as memory:
        before.add_(1).mul_(2)
        before.view(10, 100).t()
        assert memory.peak == 0
        half = before[::2].clone()
    assert (memory.peak, half.sum().item()) == (2000, 2000.0)


def test_a_chain_of_layers_keeps_its_activations_only_for_the_backward_pass():
    depth, width = 8, 100
    layers = nn.Sequential(*[nn.Tanh() for _ in range(depth)])
    x = torch.randn(width)
    with torch.no_grad(), PeakMemory() as inference:
        layers(x)
    with PeakMemory() as training:
        layers(x.clone().requires_grad_()).sum().backward()
    size = 4 * width
    assert inference.peak == 2 * size
    assert training.peak >= depth * size


def test_the_same_work_has_the_same_peak():
    model, x = network(), torch.randn(6, 4)

    def peak():
        model.zero_grad()
        with PeakMemory() as memory:
            model(x).mean().backward()
        return memory.peak

    assert peak() == peak() > 0


def test_blocks_nest():
    with PeakMemory() as outer:
        kept: Tensor = torch.zeros(100)
        with PeakMemory() as inner:
            torch.zeros(50)
    assert (inner.peak, outer.peak) == (200, kept.nbytes + 200)
