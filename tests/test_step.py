"""The sentence: it must be the loop one would write by hand, and its counts must be those of that loop."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from gradwise import Step, supervised
from gradwise.core.compat import IncompatibleWords
from gradwise.core.cost import PeakMemory
from gradwise.core.protocols import loss_function
from gradwise.core.seeded import noise
from gradwise.estimators import SPSA, Backprop
from gradwise.losses import CompSumLoss, SmoothAdversarialCompSumLoss
from gradwise.optim import AdaBelief, LinearDecay, Lion
from gradwise.transforms import ClipNorm, GradientNoise

SQUARED = supervised(mse_loss)


def network(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batches(count, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 4, generator=g).to(dtype), torch.randn(12, 3, generator=g).to(dtype)) for _ in range(count)]


def same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


# --- the loop by hand -------------------------------------------------------------------------------------------------------------


def test_a_step_is_the_loop_written_by_hand():
    ours, theirs = network(), network()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (ours, theirs)]
    step = Step(ours, SQUARED, optimizers[0], transforms=[ClipNorm(0.1)], schedule=LinearDecay(optimizers[0], total_steps=5))
    schedule = LinearDecay(optimizers[1], total_steps=5)
    for x, y in batches(5):
        report = step((x, y))
        optimizers[1].zero_grad()
        loss = mse_loss(theirs(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.parameters()))
        optimizers[1].step()
        schedule.step()
        same(ours, theirs)
        assert report.loss == float(loss.detach())
        assert report.grad_norm == pytest.approx(norm, rel=1e-6)
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]


def test_no_estimator_is_backprop():
    runs = []
    for estimator in (None, Backprop()):
        model = network()
        step = Step(model, SQUARED, Lion(model.parameters(), lr=0.01), estimator=estimator)
        assert isinstance(step.estimator, Backprop)
        runs.append((model, [step(b).loss for b in batches(3)]))
    same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_two_sided_zo_sgd_is_mezo_written_by_hand():
    model = network()
    step = Step(model, SQUARED, torch.optim.SGD(model.parameters(), lr=0.05), estimator=SPSA(mu=1e-3))
    step.generator = torch.Generator().manual_seed(5)
    theta, batch = {n: p.detach().clone() for n, p in model.named_parameters()}, batches(1)[0]
    _, grads = SPSA(mu=1e-3)(loss_function(network(), SQUARED), theta, batch, generator=torch.Generator().manual_seed(5))
    ((seed, slope),) = grads["0.weight"].terms
    report = step(batch)
    length = 0.0
    for name, p in model.named_parameters():
        u = noise(seed, name, p.shape)
        torch.testing.assert_close(p, theta[name] - 0.05 * slope * u, rtol=0, atol=1e-7)
        length += float((slope * u).double().square().sum())
    assert report.grad_norm == pytest.approx(math.sqrt(length), rel=1e-5)
    assert (report.forwards, report.backwards, report.gradient_bytes) == (2, 0, 16)


def test_a_zeroth_order_gradient_applied_in_bundles_is_the_one_applied_whole():
    def train(hooked):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(200, 200) for _ in range(12)])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        calls = []
        if hooked:  # who watches the optimizer must see one step a step
            optimizer.register_step_pre_hook(lambda *_: calls.append(sum(p.grad is not None for p in model.parameters())))
        step = Step(model, SQUARED, optimizer, estimator=SPSA(mu=1e-2), transforms=[ClipNorm(1.0)])
        data = torch.Generator().manual_seed(0)
        reports = [step((torch.randn(4, 200, generator=data), torch.zeros(4, 200))) for _ in range(2)]
        return model, [(r.loss, r.forwards) for r in reports], calls

    bundled, whole = train(False), train(True)
    same(bundled[0], whole[0])
    assert bundled[1] == whole[1]
    assert whole[2] == [24, 24]


def test_the_closure_fits_any_optimizer():
    ours, theirs = network(), network()
    batch = batches(1)[0]
    step = Step(ours, SQUARED, torch.optim.SGD(ours.parameters(), lr=0.1), transforms=[ClipNorm(0.01)])
    loss = step.optimizer.step(step.closure(batch))
    reference = Step(theirs, SQUARED, torch.optim.SGD(theirs.parameters(), lr=0.1), transforms=[ClipNorm(0.01)])(batch)
    same(ours, theirs)
    assert float(loss) == reference.loss


def test_transforms_attached_to_the_optimizer_run_after_those_of_the_step_and_are_checked_with_them():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ClipNorm(0.5).attach(optimizer)
    with pytest.raises(IncompatibleWords, match="GradientNoise cannot come before ClipNorm"):
        Step(model, SQUARED, optimizer, transforms=[GradientNoise()])
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    Step(model, SQUARED, optimizer, transforms=[ClipNorm(100.0)])(batches(1)[0])
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)


# --- counts -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "forwards", "backwards", "message"),
    [
        (Backprop(), 1, 1, 4 * 67),
        (Backprop(accumulate=3), 3, 3, 4 * 67),
        (SPSA(), 2, 0, 16),
        (SPSA(q=5), 10, 0, 5 * 16),
        (SPSA(q=5, sides=1), 6, 0, 5 * 16),
    ],
    ids=["backprop", "accumulate", "spsa", "spsa q=5", "one-sided"],
)
def test_forwards_backwards_and_bytes_of_each_estimator(estimator, forwards, backwards, message):
    model = network()
    report = Step(model, SQUARED, torch.optim.SGD(model.parameters(), lr=0.01), estimator=estimator)(batches(1)[0])
    assert (report.forwards, report.backwards, report.gradient_bytes) == (forwards, backwards, message)
    assert report.bytes_sent == 0
    assert report.peak_bytes is None
    assert report.epsilon is None
    assert report.seconds > 0


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_every_evaluation_of_lbfgs_counts(line_search):
    model, evaluations = network(), []

    def objective(model, batch):
        evaluations.append(model)
        return SQUARED(model, batch)

    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn=line_search)
    batch = batches(1)[0]
    before = float(SQUARED(model, batch).detach())
    first = torch.autograd.grad(SQUARED(model, batch), list(model.parameters()))
    report = Step(model, objective, optimizer, transforms=[ClipNorm(1e3)])(batch)
    assert len(evaluations) > 2
    assert report.forwards == report.backwards == len(evaluations)
    assert report.gradient_bytes == len(evaluations) * 4 * 67
    assert report.loss == before, "the loss is that of the parameters the step began with, as torch returns it"
    assert report.grad_norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in first)), rel=1e-5)
    assert float(SQUARED(model, batch).detach()) < before


def test_an_adversarial_objective_is_charged_for_its_ascent():
    model, steps = network(), 5
    batch = (torch.randn(6, 4), torch.randint(3, (6,)))
    objective = SmoothAdversarialCompSumLoss(gamma=0.1, steps=steps, generator=torch.Generator().manual_seed(0))
    report = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.1))(batch)
    # h(x) and h(x') with a backward pass through both; the reference scores of the ascent; its steps, forwards and backwards
    assert (report.forwards, report.backwards) == (2 + 1 + steps, 2 + steps)
    clean = Step(model, SmoothAdversarialCompSumLoss(gamma=0.0), torch.optim.SGD(model.parameters(), lr=0.1))(batch)
    assert (clean.forwards, clean.backwards) == (1, 1)


def test_an_adversarial_objective_without_a_generator_of_its_own_stands_with_spsa():
    model = network()
    objective = SmoothAdversarialCompSumLoss(gamma=0.1, steps=2)
    batch = (torch.randn(6, 4), torch.randint(3, (6,)))
    report = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.01), estimator=SPSA(mu=1e-3))(batch)
    assert (report.forwards, report.backwards) == (2 * (3 + 2), 2 * 2)  # the ascent differentiates towards the input
    assert math.isfinite(report.grad_norm)


def test_losses_of_the_comp_sum_family_train():
    torch.manual_seed(0)
    x, target = torch.randn(60, 4), torch.arange(60) % 3
    x[range(60), target] += 2
    for tau in (0.5, 1.0, 2.0):
        model = network()
        step = Step(model, supervised(CompSumLoss(tau)), torch.optim.Adam(model.parameters(), lr=0.05))
        losses = [step((x, target)).loss for _ in range(40)]
        assert losses[-1] < 0.6 * losses[0]


def test_epsilon_is_what_the_words_account_for():
    class Accounted(GradientNoise):
        epsilon = 1.5

    model = network()
    report = Step(model, SQUARED, torch.optim.SGD(model.parameters(), lr=0.1), transforms=[Accounted()])(batches(1)[0])
    assert report.epsilon == 1.5


# --- memory -----------------------------------------------------------------------------------------------------------------------


def test_a_zeroth_order_step_runs_at_the_memory_of_inference():
    width, depth = 300, 16
    model = nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])
    batch = torch.randn(32, width), torch.randn(32, width)
    largest = 4 * width * width
    with torch.no_grad(), PeakMemory() as inference:
        SQUARED(model, batch)

    def peak(estimator):
        step = Step(model, SQUARED, torch.optim.SGD(model.parameters(), lr=1e-3), estimator=estimator, measure_memory=True)
        return step(batch).peak_bytes

    zeroth = peak(SPSA())
    # one perturbed operator (or one bundle of gradients, 1 MiB or the largest tensor) beside the activations; never the whole gradient
    assert zeroth <= inference.peak + max(largest, 2**20) + largest
    assert zeroth < 0.5 * depth * largest < peak(None)


def test_backprop_through_a_step_takes_no_more_memory_than_plain_backprop():
    model = network()
    batch = batches(1)[0]
    with PeakMemory() as plain:
        mse_loss(model(batch[0]), batch[1]).backward()
    model.zero_grad()
    step = Step(model, SQUARED, torch.optim.SGD(model.parameters(), lr=1e-3), measure_memory=True)
    assert step(batch).peak_bytes <= plain.peak + 64  # the norm and a few scalars


# --- which parameters -------------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """A used, an unused and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)

    def forward(self, x):
        return x * (self.used * self.frozen).square()


@pytest.mark.parametrize("flat", [False, True])
def test_unused_and_frozen_parameters_are_left_alone(flat):
    model = Parts()
    optimizer = AdaBelief(model.parameters(), lr=0.1, weight_decay=0.5, flat=flat)
    step = Step(model, lambda m, x: m(x).sum(), optimizer, transforms=[ClipNorm(1.0), GradientNoise(eta=0.1)])
    for _ in range(3):
        report = step(torch.ones(3))
    assert report.gradient_bytes == 12, "an unused parameter has no gradient, in flat storage too"
    assert torch.equal(model.unused, torch.ones(3))
    assert torch.equal(model.frozen, torch.full((3,), 2.0))
    assert not torch.equal(model.used, torch.ones(3))
    assert optimizer.state.get(model.unused, {}).get("step", 0) == 0


def test_flat_storage_gives_the_same_step():
    models = [network(), network()]
    steps = [
        Step(m, SQUARED, AdaBelief(m.parameters(), lr=0.01, flat=flat), transforms=[ClipNorm(0.5)])
        for m, flat in zip(models, (False, True), strict=True)
    ]
    for batch in batches(3):
        reports = [step(batch) for step in steps]
        assert reports[0].loss == reports[1].loss
        assert reports[0].grad_norm == reports[1].grad_norm
        same(*models)


@pytest.mark.parametrize("estimator", [None, SPSA()], ids=["backprop", "spsa"])
def test_an_optimizer_over_some_parameters_concerns_only_those(estimator):
    model = network()
    head = dict(model[2].named_parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    foreign = model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    step = Step(model, SQUARED, torch.optim.SGD(head.values(), lr=0.1), estimator=estimator)
    batch = batches(1)[0]
    expected = torch.autograd.grad(SQUARED(model, batch), list(head.values()))
    reports = [step(batch) for _ in range(3)]
    assert model[0].weight.grad is foreign
    assert bool((foreign == 7).all())
    assert model[0].bias.grad is None, "a parameter that nobody optimizes must not gather gradients"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith("0."))
    assert not any(torch.equal(p, before[f"2.{n}"]) for n, p in head.items())
    if estimator is None:
        assert reports[0].grad_norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in expected)), rel=1e-5)
        assert reports[0].gradient_bytes == 4 * 27


def test_parameters_may_be_frozen_and_added_between_steps():
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    step = Step(model, SQUARED, optimizer)
    first, second, third = batches(3)
    assert step(first).gradient_bytes == 4 * 40
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert step(second).gradient_bytes == 4 * 67
    model[0].requires_grad_(False)
    assert step(third).gradient_bytes == 4 * 27


@pytest.mark.parametrize("estimator", [None, SPSA(mu=0.05)], ids=["backprop", "spsa"])
@pytest.mark.parametrize("build", [lambda p: torch.optim.SGD(p, lr=0.05), lambda p: AdaBelief(p, lr=0.01)], ids=["SGD", "AdaBelief"])
def test_a_bfloat16_model_trains(estimator, build):
    model, batch = network(dtype=torch.bfloat16), batches(1, torch.bfloat16)[0]
    step = Step(model, SQUARED, build(model.parameters()), estimator=estimator, transforms=[ClipNorm(1.0)])
    losses = [step(batch).loss for _ in range(60 if estimator is None else 200)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_autocast_inside_the_objective():
    def objective(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return mse_loss(model(batch[0]).float(), batch[1])

    for estimator in (None, SPSA(mu=0.05)):
        model = network()
        step = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.05), estimator=estimator, transforms=[ClipNorm(1.0)])
        losses = [step(batch).loss for batch in batches(1) * 150]
        assert sum(losses[-5:]) < sum(losses[:5])


def test_sparse_gradients_go_through_where_everybody_takes_them():
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True))
    objective = supervised(lambda out, target: mse_loss(out.flatten(1).sum(1), target))
    batch = (torch.tensor([[1], [4], [4]]), torch.ones(3))
    reference = nn.Embedding(10, 3, _weight=model[0].weight.detach().clone())
    report = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.1))(batch)
    dense = Step(reference, objective, torch.optim.SGD(reference.parameters(), lr=0.1))(batch)
    torch.testing.assert_close(model[0].weight, reference.weight)
    assert report.grad_norm == pytest.approx(dense.grad_norm, rel=1e-6)
    assert (report.gradient_bytes, dense.gradient_bytes) == (2 * 8 + 2 * 3 * 4, 120)  # two rows and their indices


# --- what is refused --------------------------------------------------------------------------------------------------------------


def test_words_that_do_not_fit_their_seam_are_named():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)
    for arguments, words, error, message in [
        (("model", SQUARED, sgd), {}, TypeError, "model must be of type Module, got str"),
        ((model, "loss", sgd), {}, TypeError, "objective must be callable"),
        ((model, SQUARED, "adam"), {}, TypeError, "optimizer must be of type Optimizer, got str"),
        ((model, SQUARED, torch.optim.SGD), {}, TypeError, r"optimizer must be an object, got the class SGD .* write SGD\(\.\.\.\)"),
        ((model, SQUARED, sgd), {"estimator": SPSA}, TypeError, "estimator must be an object, got the class SPSA"),
        ((model, SQUARED, sgd), {"estimator": ClipNorm(1.0)}, TypeError, "estimator must be of type Estimator, got ClipNorm, .* backward"),
        ((model, SQUARED, sgd), {"transforms": ClipNorm(1.0)}, TypeError, "transforms must be a list or tuple .* ClipNorm"),
        ((model, SQUARED, sgd), {"transforms": ClipNorm(1.0)}, TypeError, "transforms must be a list or tuple of .*, got ClipNorm"),
        ((model, SQUARED, sgd), {"exchange": 3}, TypeError, "exchange must be .* Exchange, got int, which lacks bytes_sent"),
        ((model, SQUARED, sgd), {"generator": 3}, TypeError, "generator must be of type Generator, got int"),
        ((model, SQUARED, sgd), {"schedule": sgd}, TypeError, "schedule must be of type LRScheduler"),
        ((model, SQUARED, sgd), {"schedule": plateau}, TypeError, "ReduceLROnPlateau needs a metric"),
        ((model, SQUARED, sgd), {"schedule": LinearDecay(other, 3)}, ValueError, "schedule drives another optimizer"),
        ((model, SQUARED, other), {}, ValueError, "optimizer holds a parameter that the model does not have"),
    ]:
        with pytest.raises(error, match=message):
            Step(*arguments, **words)


def test_an_objective_that_is_no_scalar_is_refused_at_the_step():
    model = network()
    step = Step(model, lambda m, b: cross_entropy(m(b[0]), b[1].softmax(1), reduction="none"), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"scalar tensor, got shape \(12,\)"):
        step(batches(1)[0])
