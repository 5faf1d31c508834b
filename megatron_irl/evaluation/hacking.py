"""Signs that a policy earns its reward by a trick: length, repetition, answers that never end."""

from collections.abc import Sequence

import numpy as np

from megatron_irl.types import Pair

NGRAM = 4


def hacking_signs(pairs: Sequence[Pair]) -> dict[str, float]:
    """Length, end and repetition of samples, and the repetition of demonstrations beside it.

    Returns:
        ``mean_length`` and ``demo_length`` (tokens), ``eos_rate`` (share that ended by
        themselves), ``repetition`` and ``demo_repetition`` (share of a response's 4-grams that
        stood in it before; mean over responses, each demonstration counted once).
    """
    demos = {pair.ordinal: pair.demo_ids for pair in pairs}
    return {
        "mean_length": float(np.mean([len(pair.sample_ids) for pair in pairs])),
        "demo_length": float(np.mean([len(ids) for ids in demos.values()])),
        "eos_rate": float(np.mean([pair.finish_reason == "stop" for pair in pairs])),
        "repetition": float(np.mean([repetition(pair.sample_ids) for pair in pairs])),
        "demo_repetition": float(np.mean([repetition(ids) for ids in demos.values()])),
    }


def repetition(ids: np.ndarray, size: int = NGRAM) -> float:
    """Share of n-grams that repeat an earlier one of the same response; 0 where there is none."""
    if len(ids) < size:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(ids, size)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)
