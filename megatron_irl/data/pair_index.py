"""What every rank knows of all pairs of a round: numbers, seventy bytes a pair, no token ids.

Orders, splits into microbatches, advantages and a round's line follow from these alone. The ids
themselves a rank reads for the pairs that it trains on (``data.round_pairs``).
"""

from collections.abc import Sequence

import numpy as np

from megatron_irl.types import Pair

NGRAM = 4  # tokens: shorter runs repeat in good prose too
EMPTY, DUPLICATE, USABLE = 0, 1, 2
INDEX = np.dtype([
    ("part", np.int32), ("row", np.int32),  # where the pair is
    ("ordinal", np.int64),
    ("prompt_length", np.int32), ("demo_length", np.int32), ("sample_length", np.int32),  # tokens
    ("stopped", np.bool_),  # the sample ended by itself
    ("kind", np.int8),  # EMPTY, DUPLICATE or USABLE
    ("sample_logp", np.float64),  # of the whole sample when it was drawn, nats
    ("ref_demo_logp", np.float32), ("ref_sample_logp", np.float32),  # NaN: not computed yet
    ("reward_demo", np.float32), ("reward_sample", np.float32),  # likewise
    ("demo_repetition", np.float64), ("sample_repetition", np.float64),  # see ``repetition``
])


def index_of(pairs: Sequence[Pair], part: int = 0) -> np.ndarray:
    """A row of ``INDEX`` for every pair of a part, in order."""
    return np.array([
        (part, row, pair.ordinal, len(pair.prompt_ids), len(pair.demo_ids), len(pair.sample_ids),
         pair.finish_reason == "stop", kind_of(pair), pair.sample_logprobs.sum(dtype=np.float64),
         *(np.nan if value is None else value for value in (
             pair.ref_demo_logp, pair.ref_sample_logp, pair.reward_demo, pair.reward_sample)),
         repetition(pair.demo_ids), repetition(pair.sample_ids))
        for row, pair in enumerate(pairs)
    ], dtype=INDEX)


def kind_of(pair: Pair) -> int:
    """Whether a pair can teach.

    A sample of nothing but EOS is empty. One equal to its demonstration has zero gradient under
    every pair loss.
    """
    # A sample that stopped ends with EOS, whichever id that is.
    if len(pair.sample_ids) - (pair.finish_reason == "stop") <= 0:
        return EMPTY
    return DUPLICATE if np.array_equal(pair.sample_ids, pair.demo_ids) else USABLE


def counts(kinds: np.ndarray) -> dict[str, int]:
    """How many pairs are ``duplicates``, ``empty`` and ``usable``."""
    names = {"duplicates": DUPLICATE, "empty": EMPTY, "usable": USABLE}
    return {name: int((kinds == kind).sum()) for name, kind in names.items()}


def usable_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that can teach, in order."""
    return [pair for pair in pairs if kind_of(pair) == USABLE]


def repetition(ids: np.ndarray) -> float:
    """Share of n-grams that repeat an earlier one of the same response; 0 where there is none."""
    if len(ids) < NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(ids, NGRAM)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)
