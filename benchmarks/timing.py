"""Fair timing on a noisy machine: all contenders take turns, and only ratios of medians within one run are reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int = 7, calls: int = 3) -> dict[str, float]:
    """Median seconds of a call of each contender.

    Round by round all of them have a turn, so that a slow moment hits all alike. A turn is one call that brings the contender's memory back
    into the caches, which the others have emptied, and then `calls` timed ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            run()
            for _ in range(calls):
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}
