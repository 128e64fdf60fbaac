"""Learning-rate schedules from theory: linear decay, and its refinement by the gradient norms that a first run has logged.

For SGD with weights w_1..w_T > 0 and the schedule

    eta_t = w_t (sum_{p>t} w_p) / (sum_p w_p),

the last iterate obeys E[f(x_T)] - f* <= (D^2 + sum_t w_t^2 ||g_t||^2) / (2 sum_t w_t). Equal weights give linear decay to zero,
the best choice while nothing is known. Once the norms are known the bound is least for w_t = ||g_t||^-2: where gradients are
large the rate is small, so warm-up and a fast final annealing come out by themselves. Run once, log the norms with
`GradNormLogger`, refine, run again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import median_filter
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradwise.core.named_tensors import norm
from gradwise.core.papers import paper

_Series = Sequence[float] | Tensor | NDArray[np.floating[Any]]


class _FactorSchedule(LRScheduler):
    """Multiplies each group's initial rate by `factor(t)`, t = 0..total_steps, and holds the last value after that."""

    total_steps: int

    def factor(self, step: int) -> float:
        """The multiple of the initial rate at `step` <= total_steps."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group at the current step."""
        # after the last update the counter stands at total_steps, at a rate that nobody uses: only going on is worth a warning
        if self.last_epoch == self.total_steps + 1:
            name = type(self).__name__
            message = f"{name} has run past its total_steps={self.total_steps}; the learning rate stays at its last value"
            warnings.warn(message, stacklevel=4)  # the caller of step()
        scale = self.factor(min(self.last_epoch, self.total_steps))
        return [base * scale for base in self.base_lrs]


@paper("schedule_refinement", title="When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement", arxiv="2310.07831")
class LinearDecay(_FactorSchedule):
    """Linear decay to zero after an optional linear warm-up: the recommended default when nothing is known about the run.

        factor(t) = (t + 1) / W              for t < W,
        factor(t) = 1 - (t - W) / (T - W)    for W <= t <= T,

    times each group's own initial rate. All T updates t = 0..T-1 have a positive rate; it is zero at t = T and stays so, with
    one warning when training goes on.

    Args:
        optimizer: any torch optimizer; lr may be a float or a tensor.
        total_steps: T, the number of updates, >= 1.
        warmup: W, the updates of warm-up, 0 <= W < T.
        last_epoch: as in every `LRScheduler`: -1 starts, another value resumes there.

    Raises:
        ValueError: total_steps < 1, or warmup outside [0, total_steps).

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule, rates = LinearDecay(optimizer, total_steps=5, warmup=1), []
        >>> for _ in range(5):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [1.0, 1.0, 0.75, 0.5, 0.25]

    Source: Defazio et al. 2023, theorem 1 with equal weights; the warm-up is the one of the official plots.
    """

    example: ClassVar[dict[str, Any]] = {"total_steps": 8, "warmup": 2}

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: int = 0, last_epoch: int = -1) -> None:
        if not total_steps >= 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if not 0 <= warmup < total_steps:
            raise ValueError(f"warmup must be at least 0 and below total_steps={total_steps}, got {warmup}")
        self.total_steps, self.warmup = total_steps, warmup
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """The multiple of the initial rate at `step` <= total_steps."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (self.total_steps - step) / (self.total_steps - self.warmup)


@paper("schedule_refinement")
class RefinedSchedule(_FactorSchedule):
    """A schedule given by its factors, stretched to the number of updates wanted.

    The n factors stand at n equally spaced points of the run, the first at update 0 and the last at its end, t = T; values
    between them are interpolated linearly. T = n - 1 uses every factor as it is, without the last: a refined schedule ends in
    zero, and an update with rate zero would be wasted. After t = T the rate stays at the last factor, with one warning.

    Args:
        optimizer: any torch optimizer; lr may be a float or a tensor.
        factors: multiples of each group's initial rate, shape (n,), n >= 2, finite and >= 0: what `refine_schedule` returns.
        total_steps: T, the number of updates, >= 1; None is n - 1.
        last_epoch: as in every `LRScheduler`: -1 starts, another value resumes there.

    Raises:
        ValueError: factors of another shape, negative or not finite (the first such index is named); total_steps < 1.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> schedule = RefinedSchedule(optimizer, refine_schedule([9.0, 3.0, 1.0, 1.0, 1.0]), total_steps=100)
        >>> [round(schedule.factor(t), 2) for t in (0, 25, 50, 75, 100)]
        [0.02, 0.17, 1.0, 0.5, 0.0]

    Source: Defazio et al. 2023, algorithm 1.
    """

    example: ClassVar[dict[str, Any]] = {"factors": (0.25, 1.0, 0.5, 0.0)}

    def __init__(self, optimizer: Optimizer, factors: _Series, total_steps: int | None = None, last_epoch: int = -1) -> None:
        values = _series("factors", factors)
        _require("factors", values, values >= 0, "at least 0")
        self.total_steps = len(values) - 1 if total_steps is None else total_steps
        if not self.total_steps >= 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        places = np.arange(self.total_steps + 1) * (len(values) - 1) / self.total_steps
        self.factors = torch.from_numpy(np.interp(places, np.arange(len(values)), values))
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """The multiple of the initial rate at `step` <= total_steps."""
        return float(self.factors[step])


@paper("schedule_refinement")
def refine_schedule(norms: _Series, kind: str = "l2", tau: float = 0.1, weights: _Series | None = None) -> Tensor:
    """The refined schedule of a run whose gradient norms were logged: eta_t = w_t sum_{p>t} w_p, scaled to a maximum of 1.

    The norms are smoothed by a median filter of width 2 floor(tau T / 2) + 1, before the start repeating the first norm and
    after the end mirroring the last ones; then w_t = G_t^-2 for L2 norms, w_t = G_t^-1 for L1 norms. The time is O(T) beside
    the filter's.

    Args:
        norms: norm of the whole gradient at each step, before clipping, averaged over the batch as the optimizer sees it, shape
            (T,), T >= 2. Logs above some 10,000 steps are best thinned (the authors interpolate to that many).
        kind: "l2" for SGD and Euclidean norms, "l1" for Adam and other adaptive methods and sums of magnitudes. Never mix them:
            an L1 norm grows with the number of parameters.
        tau: width of the filter as a share of the run, in (0, 1].
        weights: use these w_t, shape (T,), positive, instead of those from the norms; nothing is smoothed then.

    Returns:
        Factors in [0, 1], shape (T,), float64, for `RefinedSchedule` and the tuned base rate. The last is 0. Multiplying all
        norms by a number changes nothing.

    Raises:
        ValueError: norms or weights that are not positive and finite (the first such step is named) or of another shape, T < 2,
            an unknown kind, tau outside (0, 1].

    Example:
        >>> refine_schedule([1.0, 1.0, 1.0, 1.0, 1.0])
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)

    Source: Defazio et al. 2023, algorithm 1; smoothing and padding as in the official repository.
    """
    if kind not in ("l2", "l1"):
        raise ValueError(f'kind must be "l2" or "l1", got {kind!r}')
    if not 0 < tau <= 1:
        raise ValueError(f"tau must be in (0, 1], got {tau}")
    values = _positive("norms", norms)
    if weights is None:
        smooth = _smoothed(values, tau)
        w = (smooth.min() / smooth) ** (2 if kind == "l2" else 1)
    else:
        w = _positive("weights", weights)
        if len(w) != len(values):
            raise ValueError(f"weights must have the shape of norms, {values.shape}, got {w.shape}")
        w = w / w.max()
    tail = np.append(np.cumsum(w[:0:-1])[::-1], 0.0)
    rates = w * tail
    return torch.from_numpy(rates / rates.max())


@paper("schedule_refinement")
def last_iterate_bound(norms: _Series, rates: _Series, distance: float = 1.0) -> float:
    """The bound on E[f(x_T)] - f* of SGD with any rates: what `optimize_schedule` minimizes, in units of f.

    With S_t = sum_{p>=t} rates_p it is written in the paper as
        (D^2 + sum_t G_t^2 r_t^2) / (2 S_1) + 1/2 sum_{t<T} r_t / (S_t S_{t+1}) sum_{p>=t} G_p^2 r_p^2;
    since r_t / (S_t S_{t+1}) = 1 / S_{t+1} - 1 / S_t, summing by parts leaves
        1/2 (D^2 / S_1 + sum_{t<T} G_t^2 r_t^2 / S_{t+1} + G_T^2 r_T),
    a sum of quadratics over linear terms: convex, and without cancellation.

    Args:
        norms: G, Euclidean gradient norms, shape (T,), T >= 2.
        rates: learning rates, shape (T,), positive.
        distance: D, from the start to the minimizer, > 0.

    Raises:
        ValueError: norms, rates or distance not positive and finite, or shapes that differ.

    Example:
        >>> last_iterate_bound([1.0, 1.0], [0.5, 0.5])
        1.0

    Source: Defazio et al. 2023, section on optimizing the bound numerically.
    """
    g, r = _positive("norms", norms), _positive("rates", rates)
    if g.shape != r.shape:
        raise ValueError(f"rates must have the shape of norms, {g.shape}, got {r.shape}")
    _check_distance(distance)
    tail = np.cumsum(r[::-1])[::-1]
    return float(0.5 * (distance**2 / tail[0] + np.sum((g[:-1] * r[:-1]) ** 2 / tail[1:]) + g[-1] ** 2 * r[-1]))


@paper("schedule_refinement")
def optimize_schedule(norms: _Series, distance: float = 1.0) -> Tensor:
    """The learning rates that minimize `last_iterate_bound` for known gradient norms: the paper's second method, solved exactly
    in O(T).

    The paper runs L-BFGS-B. But of S_t, the rates that remain from step t on, the rest of the bound is a multiple v_t S_t / 2,
    so the best share to keep, u_t = S_{t+1} / S_t, follows backwards from v_T = G_T^2:
        u_t = G_t / sqrt(G_t^2 + v_{t+1}),    v_t = 2 G_t v_{t+1} / (sqrt(G_t^2 + v_{t+1}) + G_t),
    and S_1 = D / sqrt(v_1) minimizes (D^2 / S_1 + v_1 S_1) / 2, whose value is D sqrt(v_1). The bound is convex, so this is its
    minimum.

    Args:
        norms: Euclidean gradient norms of the whole gradient, shape (T,), T >= 2. They are used as they are: smooth first what
            is noisy.
        distance: D, from the start to the minimizer, > 0; the rates are proportional to it.

    Returns:
        Learning rates, not factors, shape (T,), float64, all positive, in units of distance / norm. Divide by their maximum for
        factors.

    Raises:
        ValueError: norms that are not positive and finite (the first such step is named), T < 2, distance not positive and
            finite.

    Example:
        >>> rates = optimize_schedule(torch.ones(1000))
        >>> [round(float(x), 2) for x in (rates / rates.max())[::250]]  # close to linear decay
        [1.0, 0.75, 0.5, 0.25]

    Source: Defazio et al. 2023, the numerically optimized schedule; the recursion is ours.
    """
    _check_distance(distance)
    values = _positive("norms", norms)
    g = values / values.max()
    v, keep = g[-1] ** 2, np.ones(len(g))
    for t in range(len(g) - 2, -1, -1):
        root = math.sqrt(g[t] ** 2 + v)
        # 1 - keep is stored, as v / (root (root + g)): the difference itself would cancel where v is small
        keep[t] = v / (root * (root + g[t]))
        v = 2 * g[t] * v / (root + g[t])
    remaining = distance / (values.max() * math.sqrt(v)) * np.cumprod(np.append(1.0, 1.0 - keep[:-1]))
    return torch.from_numpy(remaining * keep)


@paper("schedule_refinement")
class GradNormLogger:
    """Logs the norm of the whole gradient at each step, for `refine_schedule`.

    Call `log()` after backward (with accumulation: after the last one), before clipping and before `optimizer.step()`, once a
    step. Norms stay on their device until they are read, so logging does not make a GPU wait. Of sharded gradients (DTensor)
    the whole norm is reduced over ranks: call it on all of them.

    Args:
        params: the parameters whose gradients count, such as `model.parameters()`.
        order: 2 for SGD (sqrt of the sum of squares), 1 for Adam and other adaptive methods (sum of magnitudes).

    Raises:
        ValueError: an order other than 1 and 2; no parameters; at `log()`, no gradient at all.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> logger = GradNormLogger([w], order=2)
        >>> for _ in range(4):
        ...     w.grad = None
        ...     w.square().sum().backward()
        ...     _ = logger.log()
        >>> logger.norms
        tensor([10., 10., 10., 10.], dtype=torch.float64)
        >>> logger.refined()
        tensor([1.0000, 0.6667, 0.3333, 0.0000], dtype=torch.float64)

    Source: Defazio et al. 2023, algorithm 1 (L2 for SGD) and its L1 form for Adam.
    """

    def __init__(self, params: Iterable[Tensor], order: int = 2) -> None:
        if order not in (1, 2):
            raise ValueError(f"order must be 1 (adaptive methods) or 2 (SGD), got {order}")
        self.params, self.order = list(params), order
        if not self.params:
            raise ValueError("params must hold at least one parameter, got none")
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def log(self) -> Tensor:
        """Append the norm of the gradient as it stands; returns it, a 0-d tensor."""
        grads = {str(i): p.grad for i, p in enumerate(self.params) if p.grad is not None}
        if not grads:
            raise ValueError("no parameter has a gradient: call log() after backward and before zero_grad")
        total = norm(grads, self.order)
        total = total.full_tensor() if hasattr(total, "full_tensor") else total
        self._norms.append(total)
        return total

    @property
    def norms(self) -> Tensor:
        """All norms so far, shape (T,), float64, on the CPU."""
        return torch.stack(self._norms).double().cpu() if self._norms else torch.zeros(0, dtype=torch.float64)

    def refined(self, tau: float = 0.1) -> Tensor:
        """`refine_schedule` of these norms with the power that belongs to their order, shape (T,)."""
        return refine_schedule(self.norms, kind=f"l{self.order}", tau=tau)

    def state_dict(self) -> dict[str, Any]:
        """The norms so far and their order."""
        return {"order": self.order, "norms": self.norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: the state's norms are of another order.
        """
        if state["order"] != self.order:
            raise ValueError(f"the saved norms are of order {state['order']}, this logger's of order {self.order}: never mix them")
        self._norms = list(state["norms"].unbind())


def _smoothed(values: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
    width = 2 * (int(tau * len(values)) // 2) + 1
    padded = np.pad(values, (0, 2 * width), mode="reflect")
    return median_filter(padded, size=width, mode="nearest")[: len(values)]


def _series(name: str, values: _Series) -> NDArray[np.float64]:
    array = values.detach().double().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"{name} must have shape (T,) with T at least 2, got {array.shape}")
    return array


def _require(name: str, values: NDArray[np.float64], holds: NDArray[np.bool_], expected: str) -> None:
    wrong = np.flatnonzero(~(holds & np.isfinite(values)))
    if len(wrong):
        raise ValueError(f"{name} must be finite and {expected}, got {values[wrong[0]]} at index {wrong[0]}")


def _positive(name: str, values: _Series) -> NDArray[np.float64]:
    array = _series(name, values)
    _require(name, array, array > 0, "above 0")
    return array


def _check_distance(distance: float) -> None:
    if not 0 < distance < math.inf:
        raise ValueError(f"distance must be finite and above 0, got {distance}")
