"""The difference of engine and trainer over a round, without keeping the round's tokens."""

import sys

import numpy as np
import pytest

from megatron_irl.policy.references import Mismatch
from megatron_irl.policy.scoring import Sums


def numbers(sampled, scores):
    """Of a part: what the engine said of each sample's tokens, and what the trainer says."""
    rows = [Sums.of(np.array(score, np.float32), np.array(said, np.float32))
            for said, score in zip(sampled, scores, strict=True)]
    sums = Sums(*np.array(rows, np.float64).reshape(-1, 4).T)
    return Mismatch.numbers(sum(map(len, sampled)), sums)


def test_sums_are_those_of_all_tokens_together():
    rng = np.random.default_rng()
    mismatch, all_differences = Mismatch(), []
    for count in (3, 0, 5):
        lengths = rng.integers(1, 9, size=count)
        sampled, scores = ([rng.normal(size=n).astype(np.float32) for n in lengths]
                           for _ in range(2))
        mismatch.add(numbers(sampled, scores))
        all_differences += [a.astype(np.float64) - b for a, b in zip(sampled, scores, strict=True)]
    together = np.concatenate([*all_differences, [0.0]])[:-1]
    assert mismatch.summary() == pytest.approx({
        "mean_abs": np.abs(together).mean(), "max_abs": np.abs(together).max(),
        "kl": together.mean(),
    }, rel=1e-12, abs=1e-15)


def test_worked_by_hand_and_nothing_grows():
    mismatch = Mismatch()
    assert mismatch.summary() == {}
    mismatch.add(numbers([[-1.0, -2.0], []], [[-1.5, -0.5], [-3.0]]))  # none said of the second
    assert mismatch.summary() == {"mean_abs": 1.0, "max_abs": 1.5, "kl": -0.5}
    before = sum(map(sys.getsizeof, vars(mismatch).values()))
    mismatch.add(numbers([[0.25] * 5000], [[0.0] * 5000]))
    assert sum(map(sys.getsizeof, vars(mismatch).values())) == before
