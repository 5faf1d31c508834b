"""Two models' numbers side by side: intervals of paired differences, and what they are called."""

import numpy as np
import pytest

from megatron_irl.evaluation.intervals import paired_share_error
from megatron_irl.evaluation.measurements import Measurement, mean_of, side_by_side, text_table


def verdicts(before, after):
    return [row["verdict"] for row in side_by_side(before, after)]


def test_items_are_compared_pair_by_pair():
    """Hand-worked: differences 1, 0, 0, 0: mean 0.25, standard deviation 0.5, error 0.25."""
    (row,) = side_by_side([mean_of("t", "acc", "higher", [0, 1, 0, 1])],
                          [mean_of("t", "acc", "higher", [1, 1, 0, 1])])
    assert row["change"] == 0.25 and row["change_stderr"] == pytest.approx(0.25)
    assert row["before_stderr"] == pytest.approx(np.sqrt(1 / 3) / 2)
    assert row["verdict"] == "unclear"  # 0.25 is less than 1.96 * 0.25


def test_a_paired_change_is_seen_where_an_unpaired_one_is_not():
    rng = np.random.default_rng(0)
    old = rng.normal(size=50)
    new = old + 0.1 + 0.01 * rng.normal(size=50)
    assert verdicts([mean_of("t", "m", "higher", old)], [mean_of("t", "m", "higher", new)]) == [
        "better"]
    unpaired = [Measurement("t", "m", "higher", float(x.mean()), float(x.std() / 50**0.5), 50)
                for x in (old, new)]
    assert verdicts(unpaired[:1], unpaired[1:]) == ["unclear"]


@pytest.mark.parametrize("better, old, new, verdict", [
    ("higher", 0.2, 0.4, "better"), ("higher", 0.4, 0.2, "worse"), ("lower", 0.4, 0.2, "better"),
    ("half", 0.7, 0.52, "better"), ("half", 0.5, 0.3, "worse"), ("half", 0.25, 0.75, "same"),
    (None, 0.1, 0.9, "none"), ("higher", 0.3, 0.3, "same"), ("higher", float("nan"), 1.0, "none")])
def test_which_way_is_good(better, old, new, verdict):
    assert verdicts([Measurement("t", "m", better, old, 0.001, 9)],
                    [Measurement("t", "m", better, new, 0.001, 9)]) == [verdict]


def test_without_an_error_nothing_is_claimed_and_without_a_before_neither():
    assert verdicts([Measurement("t", "m", "higher", 0.1, None, 9)],
                    [Measurement("t", "m", "higher", 0.9, None, 9)]) == ["unclear"]
    assert verdicts([], [mean_of("t", "m", "higher", [1.0])]) == ["none"]


def test_the_table_counts():
    before = [mean_of("a", "acc", "higher", [0, 0, 0]), mean_of("b", "acc", "higher", [1, 1])]
    after = [mean_of("a", "acc", "higher", [1, 1, 1]), mean_of("b", "acc", "higher", [1, 1])]
    shown = text_table(side_by_side(before, after))
    assert "+1.0000 [+1.0000, +1.0000]  better" in shown
    assert shown.endswith("1 better, 0 worse, 0 within their interval (~), 1 the same (=)")


def test_few_items_that_are_all_alike_claim_little():
    """By hand: z²/(2 + z²) = 0.6576. Of the change, with half a pair in each of four cells: mean
    2/4, variance 3/4 - 1/4, error sqrt(0.5/4) about 2/4, so sqrt(0.5) about 1: 0 is within 1.96.
    """
    def rows(old, new, **how):
        return side_by_side([mean_of("t", "acc", "higher", old, **how)],
                            [mean_of("t", "acc", "higher", new, **how)])

    (row,) = rows([0, 0], [1, 1], is_share=True)
    assert row["before_interval"] == pytest.approx((0, 0.6576), abs=5e-5)
    assert row["change_stderr"] == pytest.approx(np.sqrt(0.5)) and row["verdict"] == "unclear"
    shown = text_table([row])
    assert "0.0000 [0.0000, 0.6576]  1.0000 [0.3424, 1.0000]  +1.0000 [-0.3859, +1.0000]" in shown
    assert text_table([{k: v for k, v in row.items() if "interval" not in k}]).count("±0.0000") == 2
    assert rows([0] * 20, [1] * 20, is_share=True)[0]["verdict"] == "better"
    (row,) = rows([0, 0], [0, 0], is_share=True)
    assert row["verdict"] == "same" and row["change_stderr"] == pytest.approx(0.5)
    (row,) = rows([0.0, 0.0], [3.5, -2.0])  # no shares: margins, say
    assert row["before_interval"] is None and row["after_interval"] is None


def test_the_error_of_many_pairs_is_the_usual_one():
    rng = np.random.default_rng(1)
    old, new = (rng.integers(0, 2, 5000).astype(float) for _ in range(2))
    usual = (new - old).std(ddof=1) / np.sqrt(5000)
    assert paired_share_error(new - old) == pytest.approx(usual, rel=1e-3)
