"""Wilson's interval by hand, and the table of the demo."""

import pytest

from megatron_irl.evaluation.intervals import wilson_interval
from megatron_irl.run.comparison import compare_table


@pytest.mark.parametrize(("count", "total", "low", "high"), [
    # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.96; by hand for n = 10:
    # z²/n = 0.38416; p = 0.5: (0.5 + 0.19208)/1.38416 = 0.5, half 1.96*sqrt(0.025+0.0096)/1.38416
    (5, 10, 0.23659, 0.76341),
    (0, 10, 0.0, 0.27753),  # 0.38416 / 1.38416
    (10, 10, 0.72247, 1.0),
    (57, 200, 0.22695, 0.35116),  # (0.294604 ± 1.96 * 0.0322937) / 1.019208
])
def test_wilson_interval(count, total, low, high):
    assert wilson_interval(count, total) == pytest.approx((low, high), abs=2e-5)


def test_compare_table():
    rows = [
        ("before", {"nll": 1.25, "exact_match_count": 0, "num_answers": 10, "exact_match": 0.0}),
        ("irft", {"nll": 1.0, "exact_match_count": 5, "num_answers": 10, "reward_accuracy": 0.75}),
        ("other", {}),
    ]
    assert compare_table(rows).splitlines() == [
        "        NLL/token          exact match [95%]  reward acc.",
        "---------------------------------------------------------",
        "before     1.2500    0.0% (0/10) [0.0, 27.8]            -",
        "irft       1.0000  50.0% (5/10) [23.7, 76.3]        75.0%",
        "other           -                          -            -",
    ]


def test_a_share_without_a_count_is_shown_bare():
    assert "12.5%" in compare_table([("x", {"exact_match": 0.125})])


def test_no_rows_and_no_columns():
    assert compare_table([]).splitlines()[0] == ""
    assert compare_table([("x", {"exact_match": None, "num_answers": 0})]).endswith("x")
