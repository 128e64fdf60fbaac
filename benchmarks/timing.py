"""Fair timing on a noisy machine: all contenders take turns, and only ratios of medians within one run are reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each contender; round by round all of them run once, so that a slow moment hits all alike."""
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def first_call(run: Callable[[], object]) -> float:
    """Seconds of the very first call: for compiled code, what compiling costs."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
