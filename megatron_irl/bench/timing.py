"""Medians over repeats, the same for us and for a peer."""

import statistics
from collections.abc import Callable
from typing import Any

from megatron_irl.bench.work import Case
from megatron_irl.hardware.stopwatch import Stopwatch


def median_seconds(work: Callable[[int], Any], case: Case) -> float:
    """Of calls of ``work`` with the number of the repeat, after the warm-up."""
    seconds = []
    for repeat in range(case.warmup + case.steps):
        with Stopwatch() as watch:
            work(repeat)
        seconds.append(watch.seconds)
    return statistics.median(seconds[case.warmup :])
