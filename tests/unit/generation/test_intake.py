"""Which requests start when: the order at the queue's end, and steps that fill a captured size."""

import numpy as np
import pytest

from megatron_irl.generation.intake import WASTE, start_order, take

CAPTURED = [576, 1088, 2112, 3136]


def test_only_the_end_of_the_queue_is_sorted():
    budgets = [5, 9, 1, 7, 3, 8, 2, 6, 4, 9]
    # Two places: the last six requests, longest first, equals in the order given.
    assert start_order(budgets, 2) == [0, 1, 2, 3, 9, 5, 7, 8, 4, 6]
    assert start_order([4] * 9, 2) == list(range(9))
    assert start_order([], 2) == []


@pytest.mark.parametrize(
    ("lengths", "decoding", "expected"),
    [
        ([256] * 8, 56, 8),  # 2104 of 2112
        ([256] * 9, 55, 8),  # 2359 would run as 3136; 8 of them as 2112
        ([256] * 11, 53, 11),  # 2869: less than a tenth of 3136 is padding
        ([256], 300, 1),  # whatever the padding, one must start
        ([600, 600], 10, 1),
        ([1000, 300, 200], 10, 3),  # one of three would be too few
        ([2000] * 3, 0, 3),  # larger than what is captured
        ([], 5, 0),
    ],
)
def test_a_step_takes_what_fills_a_captured_size(lengths, decoding, expected):
    assert take(lengths, decoding, CAPTURED) == expected


def test_without_captured_steps_all_start():
    assert take([100] * 7, 3, []) == 7


def test_padding_is_small_or_unavoidable():
    rng = np.random.default_rng()
    for _ in range(200):
        lengths = rng.integers(1, 400, rng.integers(1, 20)).tolist()
        decoding = int(rng.integers(0, 64))
        count = take(lengths, decoding, CAPTURED)
        assert 2 * count >= len(lengths) and count >= 1
        total = decoding + sum(lengths[:count])
        if count < len(lengths):
            # What was left out would have been paid for with more padding than is allowed.
            whole = decoding + sum(lengths)
            size = next(n for n in CAPTURED if n >= whole)
            assert size - whole > WASTE * size
            assert total <= max(n for n in CAPTURED if n < size)
