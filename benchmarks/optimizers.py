"""The rule engine beside torch's own fused AdamW and the same rules in pytorch_optimizer and HeavyBall.

Two models of plain tensors: "large" has 98 tensors and 29.5 M parameters (a small GPT's shapes), "small" has 600 tensors and 1.2 M
parameters. Every contender steps with the same gradients, taking turns; a row says median milliseconds and two ratios to
`torch.optim.AdamW(fused=True)`: of time, and of time per byte that the rule has to move.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import take_turns
from gradwise.core.cost import tensor_bytes
from gradwise.optim import SGDP, AdaBelief, AdamP, Lion

MOVED = {"adamw": 7, "adabelief": 7, "lion": 5, "adamp": 7, "sgdp": 5}
"""32-bit words read and written an entry: parameter, gradient and each state read, parameter and each state written."""

BARS = {
    ("large", "AdaBelief compiled flat"): 1.0, ("large", "Lion compiled flat"): 1.0,
    ("large", "AdaBelief compiled"): 1.15, ("large", "Lion compiled"): 1.15,
    ("small", "AdaBelief compiled flat"): 0.3, ("small", "Lion compiled flat"): 0.3,
}  # fmt: skip


EAGER_BAR = {f"{rule} {mode}" for rule in ("AdaBelief", "Lion") for mode in ("foreach", "foreach flat", "loop")}
"""Elementwise rules, run eagerly, against torch's own loop; AdamP and SGDP reduce over rows as well, which AdamW does not have to."""


def shapes(model: str) -> list[tuple[int, ...]]:
    if model == "small":
        return [(44, 44), (64,), (32, 64)] * 200
    width, layers = 512, 8
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*(block * layers), (8192, width), (256, width)]


def parameters(model: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in shapes(model)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def contenders(model: str) -> Iterator[tuple[str, str, torch.optim.Optimizer]]:
    """(name, rule, optimizer)"""
    yield "torch AdamW fused", "adamw", torch.optim.AdamW(parameters(model), fused=True)
    yield "torch AdamW foreach", "adamw", torch.optim.AdamW(parameters(model), foreach=True)
    yield "torch AdamW loop", "adamw", torch.optim.AdamW(parameters(model), foreach=False)
    for mode, flat in (("compiled", True), ("compiled", False), ("foreach", True), ("foreach", False), ("loop", False)):
        for cls in (AdaBelief, Lion, AdamP, SGDP):
            label = f"{cls.__name__} {mode}{' flat' if flat else ''}"
            yield label, cls.__name__.lower(), cls(parameters(model), lr=1e-3, mode=mode, flat=flat)
    for mode in ("compiled", "foreach"):
        for cls in (AdaBelief, Lion):
            yield f"{cls.__name__} {mode} flat 8bit", cls.__name__.lower(), cls(parameters(model), mode=mode, flat=True, state="8bit")
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer as peer

        for name in ("AdaBelief", "Lion", "AdamP", "SGDP"):
            yield f"pytorch_optimizer {name}", name.lower(), getattr(peer, name)(parameters(model), lr=1e-3)
    if importlib.util.find_spec("heavyball"):
        import heavyball

        yield "HeavyBall AdamW", "adamw", heavyball.AdamW(parameters(model), lr=1e-3)  # it has neither AdaBelief nor Lion nor AdamP


def first_compiled_step() -> float:
    """Seconds from building a compiled optimizer to its first step done, in a fresh process with an empty compile cache."""
    code = (
        "import os, tempfile; os.environ['TORCHINDUCTOR_CACHE_DIR'] = tempfile.mkdtemp()\n"
        "import torch, time\nfrom gradwise.optim import AdaBelief\nfrom benchmarks.optimizers import parameters\n"
        "p = parameters('large'); t = time.perf_counter(); AdaBelief(p, mode='compiled').step(); print(time.perf_counter() - t)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])


def _step_of(opt: Any) -> Callable[[], object]:
    """A step with the same gradients every time; HeavyBall drops them as it goes, so they are put back."""
    if type(opt).__module__.split(".")[0] != "heavyball":
        return opt.step
    held = [(p, p.grad) for group in opt.param_groups for p in group["params"]]

    def step() -> None:
        for p, grad in held:
            p.grad = grad
        opt.step()

    return step


def measure(model: str, console: Console, only: Callable[[str], bool] = lambda name: True) -> dict[str, float]:
    made: dict[str, tuple[str, Any]] = {}
    for name, rule, opt in contenders(model):
        if only(name) or name == "torch AdamW fused":
            made[name] = rule, opt
    seconds = take_turns({name: _step_of(opt) for name, (_, opt) in made.items()})
    reference = seconds["torch AdamW fused"]
    entries = sum(p.numel() for p in parameters(model))
    table = Table(title=f"{model}: {len(shapes(model))} tensors, {entries / 1e6:.1f} M parameters, {torch.get_num_threads()} threads")
    for column in ("optimizer", "ms", "time / fused", "time per byte / fused", "bar", "holds", "state bytes a parameter"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for name, (rule, opt) in made.items():
        ratio = seconds[name] / reference
        per_byte = ratio * MOVED["adamw"] / MOVED[rule]
        bar = BARS.get((model, name))
        if name in EAGER_BAR:
            bar_text, holds = "torch loop", seconds[name] <= seconds.get("torch AdamW loop", float("inf"))
        else:
            bar_text, holds = (f"{bar}" if bar else ""), bar is None or (ratio if model == "small" else per_byte) <= bar
        state = tensor_bytes([{k: v for k, v in s.items() if k != "step"} for s in opt.state.values()]) / entries
        verdict = ("yes" if holds else "NO") if bar_text else ""
        table.add_row(name, f"{seconds[name] * 1e3:.2f}", f"{ratio:.2f}", f"{per_byte:.2f}", bar_text, verdict, f"{state:.2f}")
    console.print(table)
    return seconds


def main() -> None:
    torch.set_num_threads(2)
    console = Console(width=130)
    measure("large", console)
    measure("small", console)
    console.print(f"first compiled step, empty cache: {first_compiled_step():.1f} s (bar: 5 s)")


if __name__ == "__main__":
    main()
