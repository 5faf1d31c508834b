"""Paired comparisons of methods on the same prompts and seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """A mean paired difference, its 95 % bootstrap interval, and the p of no difference."""

    mean: float
    low: float
    high: float
    p: float


def paired_difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, draws: int = 20000
) -> Difference:
    """Ours minus theirs, paired by prompt and seed.

    The interval resamples prompts within each seed, so it speaks of these seeds. The p-value is
    two-sided, of the test that flips the signs of the prompts' differences at random.

    Args:
        ours, theirs: A list a seed, of a score a prompt.
    """
    rng = np.random.default_rng(0)
    by_seed = [np.subtract(a, b) for a, b in zip(ours, theirs, strict=True)]
    every = np.concatenate(by_seed)
    resampled = np.mean([
        rng.choice(part, (draws, len(part))).mean(1) for part in by_seed
    ], axis=0)
    low, high = np.quantile(resampled, [0.025, 0.975])
    changed = every[every != 0]
    signs = rng.integers(0, 2, (draws, len(changed)), dtype=np.int8) * 2 - 1
    extreme = np.abs(signs @ changed) >= abs(changed.sum()) - 1e-9
    p = (1 + int(extreme.sum())) / (1 + draws)
    return Difference(float(every.mean()), float(low), float(high), p)
