"""Annealed Gaussian gradient noise: explore early, settle late.

Before the optimizer, every entry of the gradient receives independent noise of variance eta / (1 + t)^gamma at step t. Early on
the noise carries very deep or badly initialised networks off plateaus and saddle points where the gradient vanishes; its decay
lets them converge. The noise is absolute, not relative to the gradient, so an adaptive optimizer sees it in its second moment:
where gradients are much smaller than the noise, Adam's steps shrink by their ratio. It is not differential privacy: no
example's share is bounded.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradwise.core.named_tensors import dense
from gradwise.core.papers import paper
from gradwise.core.protocols import Gradients, LazyGradient, NamedTensors
from gradwise.core.search_space import Choice, SearchSpace
from gradwise.core.transform import Change, GradientTransform


@paper("gradient_noise", title="Adding Gradient Noise Improves Learning for Very Deep Networks", arxiv="1511.06807")
class GradientNoise(GradientTransform):
    """g_t <- g_t + n_t, n_t ~ Normal(0, eta / (1 + t)^gamma), independent for every entry and step; t counts this object's uses
    from 0.

    eta is a VARIANCE: the paper's 0.01 is a standard deviation of 0.1 at the first step. Put it after clipping, which would
    shrink the noise.

    Which noise: one generator is consumed tensor by tensor in the order of the gradient's names, which is the model's order of
    parameters and so the same on every rank. Ranks of a data-parallel run that share the seed (the default does) therefore add
    the same noise to the averaged gradient, which keeps its variance and keeps the replicas equal. Noise of half-precision
    gradients is drawn and added in float32 and rounded once. Lazy gradients become tensors, since noise has no shorter form.

    Args:
        eta: variance of the noise at the first step, >= 0, in squared units of the gradient. The paper chooses among 0.01, 0.3
            and 1.0.
        gamma: decay exponent of the variance, >= 0; 0 keeps it constant (the paper's ablation, which works less well).
        generator: a `torch.Generator` on the gradients' device; or an integer seed, from which one is made there at the first
            use; None is seed 0. Runs that are to differ need different seeds.

    Attributes:
        step: uses so far, the t of the next one.

    Raises:
        ValueError: eta or gamma negative or not finite; at use, gradients that are not all on the generator's device, or a
            sparse or sharded one (by name).
        TypeError: a generator that is neither a generator nor an integer.

    Example:
        >>> noise = GradientNoise(eta=1.0, generator=0)
        >>> noisy = noise({"w": torch.zeros(10_000)}, {})["w"]
        >>> bool((noisy.std() - 1.0).abs() < 0.03), noise.step
        (True, 1)

    Source: Neelakantan et al. 2015, section 2.
    """

    search_space: ClassVar[SearchSpace] = {"eta": Choice((0.01, 0.3, 1.0))}
    traits: ClassVar[tuple[str, ...]] = ("adds noise",)

    def __init__(self, eta: float = 0.01, gamma: float = 0.55, generator: torch.Generator | int | None = None) -> None:
        annealed_noise_std(0, eta, gamma)
        if not isinstance(generator, torch.Generator | int | None):
            raise TypeError(f"generator must be a torch.Generator, an integer seed or None, got {type(generator).__name__}")
        self.eta, self.gamma, self.step = eta, gamma, 0
        self._generator = generator if isinstance(generator, torch.Generator) else None
        self._seed = None if isinstance(generator, torch.Generator) else generator or 0

    def plan(self, grads: Gradients, params: NamedTensors) -> Change:
        """This step's standard deviation, and the draw of each tensor."""
        generator = self._generator_of(grads)
        std = annealed_noise_std(self.step, self.eta, self.gamma)
        self.step += 1

        def change(name: str, grad: Tensor | LazyGradient) -> Tensor | LazyGradient:
            if std == 0:
                return grad.clone() if isinstance(grad, Tensor) else grad
            grad = dense(grad)
            wide = torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else grad.dtype
            noise = torch.randn(grad.shape, dtype=wide, device=grad.device, generator=generator)
            return torch.add(grad.to(wide), noise, alpha=std, out=noise).to(grad.dtype)

        return change

    def state_dict(self) -> dict[str, Any]:
        """Step counter, seed, and the generator's device and state (None before the first draw of a seeded one)."""
        generator = self._generator
        device, drawn = (None, None) if generator is None else (str(generator.device), generator.get_state())
        return {"step": self.step, "seed": self._seed, "device": device, "generator": drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`: the next noise is the one that the saved object would have added.

        Raises:
            ValueError: keys are missing or unknown, or the state was saved from a generator of another kind of device, whose
                stream cannot be continued on this one.
        """
        super().load_state_dict(state)
        generator = self._generator
        if state["device"] is None:
            generator = generator.manual_seed(state["seed"]) if generator is not None else None
        else:
            saved = torch.device(state["device"])
            generator = generator if generator is not None else torch.Generator(saved)
            if generator.device.type != saved.type:
                raise ValueError(f"the noise was saved from a generator on {saved}, and this generator is on {generator.device}")
            generator.set_state(state["generator"].cpu())
        self._generator, self._seed, self.step = generator, state["seed"], state["step"]

    def _generator_of(self, grads: Gradients) -> torch.Generator | None:
        for name, grad in grads.items():
            if hasattr(grad, "full_tensor"):
                raise ValueError(f"the gradient of {name!r} is sharded (DTensor): every shard would receive the same noise")
            if self._generator is None and self._seed is not None:
                self._generator = torch.Generator(grad.device).manual_seed(self._seed)
            here = self._generator.device if self._generator is not None else grad.device
            if (here.type, here.index or 0) != (grad.device.type, grad.device.index or 0):
                raise ValueError(f"generator is on {here}, but the gradient of {name!r} is on {grad.device}")
        return self._generator


@paper("gradient_noise")
def annealed_noise_std(step: int, eta: float = 0.01, gamma: float = 0.55) -> float:
    """Standard deviation of the noise at step t = 0, 1, ...: sqrt(eta / (1 + t)^gamma), in units of the gradient.

    Raises:
        ValueError: step < 0, or eta or gamma negative or not finite.

    Example:
        >>> annealed_noise_std(0, eta=0.01), round(annealed_noise_std(1, eta=1.0), 4)
        (0.1, 0.8265)

    Source: Neelakantan et al. 2015, equation 1.
    """
    if not step >= 0:
        raise ValueError(f"step must be at least 0, got {step}")
    for name, value in (("eta", eta), ("gamma", gamma)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return math.sqrt(eta) * (1.0 + step) ** (-0.5 * gamma)
