"""Advantages of scored samples by hand, and the signs of a policy that games its reward."""

import numpy as np
import pytest

from megatron_irl.algorithms.advantages import (
    RolloutRows,
    advantages,
    describe_rewards,
    log_ratios,
)
from megatron_irl.algorithms.rft import PolicyConfig
from megatron_irl.data.pair_index import index_of, repetition
from megatron_irl.evaluation.hacking import hacking_signs
from megatron_irl.types import Pair


def pair(reward: float, *, logp: float = -1.0, ref: float = -1.0, ids=(5, 6), ordinal: int = 0,
         finish: str = "stop", demo=(7,), reward_demo: float = 0.0) -> Pair:
    """A scored sample whose log-probabilities sum to ``logp``."""
    each = np.full(len(ids), logp / len(ids), np.float32)
    return Pair(ordinal, np.array([1], np.int32), np.array(demo, np.int32),
                np.array(ids, np.int32), each, finish,  # type: ignore[arg-type]
                ref_demo_logp=0.0, ref_sample_logp=ref, reward_demo=reward_demo,
                reward_sample=reward)


def earned(pairs: list[Pair], beta: float = 0.0, **options) -> list[float]:
    options = {"samples_per_prompt": 2, "normalize": "none"} | options
    return advantages(index_of(pairs), PolicyConfig(**options), beta).tolist()


def test_leave_one_out_is_within_a_prompt():
    # Two prompts of two samples: 3 - 1 and 10 - 4, each way.
    assert earned([pair(3), pair(1), pair(10), pair(4)]) == [2, -2, 6, -6]
    three = [pair(1), pair(2), pair(6)]
    assert earned(three, samples_per_prompt=3) == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])


def test_the_penalty_is_beta_times_the_log_ratio_of_the_whole_response():
    # log-ratios -1 - (-3) = 2 and -1 - (-2) = 1: rewards 3 - 0.5 * 2 = 2 and 1 - 0.5 * 1 = 0.5
    pairs = [pair(3, ref=-3.0), pair(1, ref=-2.0)]
    assert log_ratios(index_of(pairs)).tolist() == [2, 1]
    assert earned(pairs, beta=0.5) == pytest.approx([1.5, -1.5])


def test_normalizing_divides_the_reward_and_not_the_penalty():
    # rewards 3 and 1 have a spread of 1... times 4 it is 4, and the rewards are 3 and 1 again
    pairs = [pair(12, ref=-3.0), pair(4, ref=-2.0)]
    assert earned(pairs, beta=0.5, normalize="round") == pytest.approx(
        [(3 - 1) - 0.5 * (2 - 1), -1.5]
    )
    scaled = [pair(1200, ref=-3.0), pair(400, ref=-2.0)]
    assert earned(scaled, beta=0.5, normalize="round") == pytest.approx([1.5, -1.5])


def test_equal_rewards_are_not_blown_up():
    pairs = [pair(0.1 + 1e-9), pair(0.1)]
    assert np.abs(earned(pairs, normalize="round")).max() < 1e-6


def test_a_truncated_sample_earns_no_more_than_the_worst_that_ended():
    pairs = [pair(9, finish="length"), pair(3), pair(1, finish="length"), pair(5)]
    assert earned(pairs) == [0, 0, -4, 4]  # 9 is capped at 3; 1 is below it already
    assert earned(pairs, truncated="keep") == [6, -6, -4, 4]
    nobody_ended = [pair(9, finish="length"), pair(3, finish="length")]
    assert earned(nobody_ended) == [6, -6]


def test_rollouts_carry_the_sampled_tokens():
    first = RolloutRows([pair(3, logp=-4.0, ref=-6.0), pair(1)], np.array([0.25, -0.25]))[0]
    assert first.advantage == 0.25
    assert first.sample_ids.tolist() == [5, 6] and first.sample_logprobs.tolist() == [-2, -2]
    assert first.ref_logp == -6.0


def test_description():
    pairs = [pair(3, reward_demo=4, ref=-3.0, logp=-2.0), pair(1, reward_demo=1, ref=-2.0)]
    found = describe_rewards(index_of(pairs))
    assert found["demo_mean"] == 2.5 and found["sample_mean"] == 2 and found["sample_std"] == 1
    assert found["accuracy"] == 0.75  # one won, one tied
    assert found["kl_to_reference"] == pytest.approx((1 + 1) / 2)
    assert found["entropy"] == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)


def test_repetition_counts_repeated_four_grams():
    assert repetition(np.arange(20)) == 0
    assert repetition(np.array([1, 2, 3])) == 0
    # 1 2 3 4 1 2 3 4 1: six 4-grams, of which the last two stood there before.
    assert repetition(np.array([1, 2, 3, 4, 1, 2, 3, 4, 1])) == pytest.approx(2 / 6)
    assert repetition(np.full(10, 3)) == pytest.approx(6 / 7)


def test_hacking_signs_count_a_demonstration_once():
    loops = np.full(10, 3)
    pairs = [pair(0, ids=loops, finish="length", demo=(1, 2)),
             pair(0, ids=(1, 2), demo=(1, 2)),
             pair(0, ids=(1, 2, 3), demo=(1, 2, 3, 4), ordinal=1)]
    signs = hacking_signs(index_of(pairs))
    assert signs["mean_length"] == 5 and signs["eos_rate"] == pytest.approx(2 / 3)
    assert signs["demo_length"] == 3 and signs["demo_repetition"] == 0
    assert signs["repetition"] == pytest.approx(6 / 7 / 3)
