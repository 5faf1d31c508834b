"""Signs that a policy earns its reward by a trick: length, repetition, answers that never end."""

import numpy as np


def hacking_signs(index: np.ndarray) -> dict[str, float]:
    """Length, end and repetition of samples, and the repetition of demonstrations beside it.

    Args:
        index: A row of ``data.pair_index.INDEX`` for each pair.

    Returns:
        ``mean_length`` and ``demo_length`` (tokens), ``eos_rate`` (share that ended by
        themselves), ``repetition`` and ``demo_repetition`` (share of a response's 4-grams that
        stood in it before; mean over responses, each demonstration counted once).
    """
    demos = index[np.sort(np.unique(index["ordinal"], return_index=True)[1])]
    return {
        "mean_length": float(index["sample_length"].mean()),
        "demo_length": float(demos["demo_length"].mean()),
        "eos_rate": float(index["stopped"].mean()),
        "repetition": float(index["sample_repetition"].mean()),
        "demo_repetition": float(demos["demo_repetition"].mean()),
    }
