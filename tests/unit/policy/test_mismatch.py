"""The difference of engine and trainer over a round, without keeping the round's tokens."""

import sys

import numpy as np
import pytest

from megatron_irl.policy.pairs import Mismatch
from megatron_irl.types import Pair


def pair(logprobs):
    ids = np.zeros(len(logprobs), np.int32)
    return Pair(0, ids, ids, ids, np.array(logprobs, np.float32), "stop")


def test_sums_are_those_of_all_tokens_together():
    rng = np.random.default_rng()
    mismatch, all_differences = Mismatch(), []
    for count in (3, 0, 5):
        pairs = [pair(rng.normal(size=rng.integers(1, 9))) for _ in range(count)]
        sampled = [rng.normal(size=len(p.sample_ids)).astype(np.float32) for p in pairs]
        scores = [row for own in sampled for row in (np.full(4, np.nan, np.float32), own)]
        mismatch.add(pairs, scores)
        all_differences += [p.sample_logprobs.astype(np.float64) - s
                            for p, s in zip(pairs, sampled, strict=True)]
    together = np.concatenate([*all_differences, [0.0]])[:-1]
    assert mismatch.summary() == pytest.approx({
        "mean_abs": np.abs(together).mean(), "max_abs": np.abs(together).max(),
        "kl": together.mean(),
    }, rel=1e-12, abs=1e-15)


def test_worked_by_hand_and_nothing_grows():
    mismatch = Mismatch()
    assert mismatch.summary() == {}
    mismatch.add([pair([-1.0, -2.0]), pair([])], [np.zeros(1), np.array([-1.5, -0.5]),
                                                  np.zeros(1), np.zeros(0)])
    assert mismatch.summary() == {"mean_abs": 1.0, "max_abs": 1.5, "kl": -0.5}
    before = sum(map(sys.getsizeof, vars(mismatch).values()))
    mismatch.add([pair([0.25] * 5000)], [np.zeros(1), np.zeros(5000)])
    assert sum(map(sys.getsizeof, vars(mismatch).values())) == before
