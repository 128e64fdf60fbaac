"""A Step saved in the middle, thrown away and loaded goes on to the same bits, with words of every kind."""

import io

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

from gradwise import Step, supervised
from gradwise.estimators import SPSA, Backprop
from gradwise.losses import CompSumLoss, SmoothAdversarialCompSumLoss
from gradwise.optim import SGDP, AdaBelief, AdamP, LinearDecay, Lion, RefinedSchedule
from gradwise.transforms import ClipNorm, GradientNoise

ENTROPY = supervised(cross_entropy)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def refined(optimizer):
    return RefinedSchedule(optimizer, [0.25, 1.0, 0.5, 0.0], total_steps=7)


def warm_cosine(optimizer):
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, 5)], milestones=[2])


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=7)


def adversarial(seed=0):
    return SmoothAdversarialCompSumLoss(gamma=0.1, steps=2, generator=seeded(seed))


def noisy(seed=7):
    return [ClipNorm(0.5), GradientNoise(eta=0.1, generator=seed)]


# (optimizer, the other words); each is called anew for every Step
SENTENCES = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda o: {}),
    "adamw, linear decay": (lambda p: torch.optim.AdamW(p, lr=0.01), lambda o: {"schedule": LinearDecay(o, 7, warmup=2)}),
    "adabelief, refined": (lambda p: AdaBelief(p, lr=0.01), lambda o: {"schedule": refined(o), "transforms": noisy()}),
    "adabelief, 8 bit": (lambda p: AdaBelief(p, lr=0.01, state="8bit", min_8bit_size=0), lambda o: {"schedule": one_cycle(o)}),
    "lion, flat": (lambda p: Lion(p, lr=0.01, flat=True), lambda o: {"schedule": warm_cosine(o), "transforms": noisy()}),
    "adamp, loop": (lambda p: AdamP(p, lr=0.01, mode="loop"), lambda o: {"estimator": Backprop(accumulate=3)}),
    "sgdp, noise": (lambda p: SGDP(p, lr=0.1, momentum=0.9), lambda o: {"transforms": noisy()}),
    "lbfgs": (lambda p: torch.optim.LBFGS(p, lr=0.3, max_iter=3, history_size=4), lambda o: {"transforms": [ClipNorm(5.0)]}),
    "spsa": (lambda p: torch.optim.SGD(p, lr=0.01), lambda o: {"estimator": SPSA(q=2, seed=1)}),
    "spsa, generator": (lambda p: torch.optim.Adam(p), lambda o: {"estimator": SPSA(), "generator": seeded(9), "transforms": noisy()}),
    "adversarial": (lambda p: AdaBelief(p, lr=0.01), lambda o: {"objective": adversarial()}),
    "comp-sum": (lambda p: Lion(p, lr=0.01), lambda o: {"objective": supervised(CompSumLoss(0.5))}),
}


def build(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    make, words_of = SENTENCES[name]
    optimizer = make(model.parameters())
    words = words_of(optimizer)
    return Step(model, words.pop("objective", ENTROPY), optimizer, **words)


def data(count):
    g = seeded(1)
    return [(torch.randn(12, 4, generator=g), torch.randint(3, (12,), generator=g)) for _ in range(count)]


def from_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def facts(report):
    return report.loss, report.grad_norm, report.forwards, report.backwards, report.gradient_bytes


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("name", SENTENCES)
def test_resumes_to_the_bit(name, at):
    whole = build(name)
    expected = [facts(whole(batch)) for batch in data(7)]
    first = build(name)
    reports = [facts(first(batch)) for batch in data(7)[:at]]
    saved = from_disk({"model": first.model.state_dict(), "step": first.state_dict()})
    first(data(1)[0])  # whatever it does afterwards
    resumed = build(name, seed=5)
    resumed(data(1)[0])  # whatever it did before
    resumed.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["step"])
    assert resumed.steps == at
    reports += [facts(resumed(batch)) for batch in data(7)[at:]]
    assert reports == expected
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert whole.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]


def test_an_exchange_with_a_memory_is_saved_with_the_rest():
    class Remembering:
        bytes_sent = 0

        def __init__(self, error=0.0):
            self.error = torch.tensor(error)

        def register(self, model):
            """Nothing to install."""

        def state_dict(self):
            return {"error": self.error}

        def load_state_dict(self, state):
            self.error = state["error"]

    def step(error):
        one = build("sgd")
        one.exchange = Remembering(error)  # the hook itself is tests/test_step_distributed.py's matter
        return one

    resumed = step(0.0)
    resumed.load_state_dict(from_disk(step(3.0).state_dict()))
    assert float(resumed.exchange.error) == 3.0


def test_the_state_of_other_words_is_refused():
    state = from_disk(build("sgd").state_dict())
    with pytest.raises(ValueError, match=r"optimizer SGD, not of .*optimizer Lion"):
        build("lion, flat").load_state_dict(state)
    with pytest.raises(ValueError, match=r"not of estimator SPSA, transforms\[0\] ClipNorm"):
        build("spsa, generator").load_state_dict(state)
    with pytest.raises(ValueError, match=r"lacks .*'words'"):
        build("sgd").load_state_dict({"steps": 3})


@pytest.mark.parametrize("saved_with", [True, False])
def test_a_generator_on_one_side_only_is_refused(saved_with):
    steps = []
    for has_generator in (saved_with, not saved_with):
        step = build("spsa")
        step.generator = seeded() if has_generator else None
        steps.append(step)
    with pytest.raises(ValueError, match=f"saved {'with' if saved_with else 'without'} a generator"):
        steps[1].load_state_dict(from_disk(steps[0].state_dict()))
