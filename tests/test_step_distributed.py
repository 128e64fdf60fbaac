"""The exchange: a communication hook on DDP's buckets, in a process group of one, which is enough to see every byte pass."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from gradwise import Step, supervised
from gradwise.core.compat import IncompatibleWords
from gradwise.core.protocols import Exchange
from gradwise.estimators import SPSA, Backprop
from gradwise.optim import AdaBelief, Lion
from gradwise.transforms import ClipNorm

SQUARED = supervised(mse_loss)
BYTES = 4 * (4 * 8 + 8 + 8 * 3 + 3)


@pytest.fixture(autouse=True)
def _process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class CountingExchange:
    """Sends every bucket as it is (halved, if asked) and counts it."""

    def __init__(self, factor=1.0):
        self.bytes_sent, self.buckets, self.factor = 0, 0, factor

    def register(self, model):
        model.register_comm_hook(self, CountingExchange.send)

    @staticmethod
    def send(exchange, bucket):
        exchange.bytes_sent += bucket.buffer().nbytes
        exchange.buckets += 1
        future = torch.futures.Future()
        future.set_result(bucket.buffer() * exchange.factor)
        return future


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(count):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 4, generator=g), torch.randn(12, 3, generator=g)) for _ in range(count)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("views", [False, True], ids=["buckets", "bucket views"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_one_gradient_a_step_is_exchanged_and_counted(accumulate, views):
    plain, model = network(), network()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views)
    exchange = CountingExchange()
    assert isinstance(exchange, Exchange)
    step = Step(wrapped, SQUARED, sgd(wrapped), estimator=Backprop(accumulate), transforms=[ClipNorm(1.0)], exchange=exchange)
    reference = Step(plain, SQUARED, sgd(plain), estimator=Backprop(accumulate), transforms=[ClipNorm(1.0)])
    for batch in batches(3):
        report, expected = step(batch), reference(batch)
        assert report.bytes_sent == report.gradient_bytes == BYTES
        assert (report.forwards, report.backwards) == (accumulate, accumulate)
        assert report.loss == expected.loss
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert exchange.bytes_sent == 3 * BYTES


def test_transforms_and_the_optimizer_see_what_arrived():
    model = DistributedDataParallel(network())
    plain = network()
    halved = Step(model, SQUARED, sgd(model), exchange=CountingExchange(0.5))(batches(1)[0])
    whole = Step(plain, SQUARED, sgd(plain))(batches(1)[0])
    assert halved.grad_norm == pytest.approx(0.5 * whole.grad_norm, rel=1e-6)


def test_every_evaluation_of_a_line_search_is_sent():
    model = DistributedDataParallel(network())
    report = Step(model, SQUARED, torch.optim.LBFGS(model.parameters(), max_iter=3), exchange=CountingExchange())(batches(1)[0])
    assert report.forwards > 1
    assert report.bytes_sent == report.gradient_bytes == report.forwards * BYTES


def test_an_exchange_needs_ddp():
    model = network()
    exchange = CountingExchange()
    with pytest.raises(IncompatibleWords, match=r"CountingExchange cannot stand with Sequential: .* wrap it first"):
        Step(model, SQUARED, sgd(model), exchange=exchange)
    assert exchange.bytes_sent == 0


def test_an_objective_that_is_a_module_is_not_taken_for_the_model():
    class Objective(nn.Module):
        def forward(self, model, batch):
            return SQUARED(model, batch)

    model = DistributedDataParallel(network())
    report = Step(model, Objective(), sgd(model), exchange=CountingExchange())(batches(1)[0])
    assert report.bytes_sent == BYTES


def test_what_cannot_stand_with_ddp():
    model = DistributedDataParallel(network())
    with pytest.raises(IncompatibleWords, match=r"SPSA cannot stand with DistributedDataParallel.*unwrapped"):
        Step(model, SQUARED, sgd(model), estimator=SPSA())
    views = DistributedDataParallel(network(), gradient_as_bucket_view=True)
    with pytest.raises(IncompatibleWords, match=r"Lion cannot stand with DistributedDataParallel.*flat=True"):
        Step(views, SQUARED, Lion(views.parameters(), flat=True))


def test_flat_storage_stands_with_ddp_that_keeps_its_own_buckets():
    plain, model = network(), DistributedDataParallel(network())
    step = Step(model, SQUARED, AdaBelief(model.parameters(), lr=0.01, flat=True), exchange=CountingExchange())
    reference = Step(plain, SQUARED, AdaBelief(plain.parameters(), lr=0.01))
    for batch in batches(3):
        assert step(batch).bytes_sent == BYTES
        reference(batch)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
