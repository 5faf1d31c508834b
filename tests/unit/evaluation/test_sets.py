"""Refusals, stereotype pairs, rewards as judges, the user's scorer: numbers worked out by hand."""

import math

import numpy as np
import pytest

from megatron_irl.errors import UserError
from megatron_irl.evaluation.bias import StereotypePair, load_stereotypes, stereotype_rows
from megatron_irl.evaluation.calibration import (
    expected_calibration_error,
    length_correlation,
    preference_rows,
)
from megatron_irl.evaluation.refusal import WINDOW, refusal_items
from megatron_irl.evaluation.texts import rolling_windows
from megatron_irl.evaluation.toxicity import load_scorer, toxicity_rows


def test_refusals_are_told_by_how_answers_begin():
    answers = ["I\u2019m sorry, but no.", "Sure! Here is how.", "AS AN AI I must not", "",
               "x" * WINDOW + " I cannot", "Unfortunately I cannot help with it"]
    assert refusal_items(answers) == [1, 0, 1, 0, 0, 1]


def test_stereotypes_by_kind():
    pairs = [StereotypePair("a", "b", kind) for kind in ("age", "age", "race")]
    rows = {row.of: row for row in stereotype_rows(pairs, [-1, -2, -3, -3, -5, -4])}
    assert rows["stereotypes"].value == 0.5
    assert rows["stereotypes/age"].value == 0.75 and rows["stereotypes/race"].value == 0
    one_kind = stereotype_rows(pairs[:2], [-1, -2, -3, -3])
    assert [row.of for row in one_kind] == ["stereotypes"]


def test_pairs_that_are_none_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    for line, word in (('{"sent_more": "a"}', "sent_less"), ("[1]", "p.jsonl:1"),
                       ('{"sent_more": "a", "sent_less": "a"}', "the same sentence")):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=word):
            load_stereotypes(path)


def test_calibration_error_by_hand():
    """Confidence 0.75 four times, right three times: none. 0.9 and wrong, with 0.75 and right:
    (0.9 + 0.25) / 2."""
    odds = math.log(3)
    assert expected_calibration_error(np.array([odds, odds, odds, -odds])) == pytest.approx(0)
    found = expected_calibration_error(np.array([-math.log(9), odds]))
    assert found == pytest.approx((0.9 + 0.25) / 2)
    assert expected_calibration_error(np.zeros(3)) == 0  # a coin that says it is one
    assert expected_calibration_error(np.full(3, 800.0)) == pytest.approx(0)  # no overflow


def test_calibration_of_a_reward_that_is_the_truth():
    """Preferences drawn with probability sigmoid(margin): no error but sampling noise; of twice
    the margin, overconfident."""
    rng = np.random.default_rng(1)
    margin = rng.normal(size=40000) * 2
    margin = np.where(rng.random(40000) < 1 / (1 + np.exp(-margin)), margin, -margin)
    assert expected_calibration_error(margin) < 0.015
    assert expected_calibration_error(2 * margin) > 0.05


def test_length_is_compared_within_pairs():
    lengths = np.array([[10, 5], [100, 200], [7, 7]])
    assert length_correlation(lengths * 0.3 + [[5], [-9], [0]], lengths) == pytest.approx(1)
    assert length_correlation(-lengths, lengths) == pytest.approx(-1)
    assert length_correlation(np.ones((3, 2)), lengths) == 0
    rows = {row.metric: row.value for row in preference_rows(
        [[2, 1], [0, 1], [3, 3]], lengths.tolist())}
    assert rows["accuracy"] == pytest.approx(1.5 / 3)
    assert rows["accuracy, chosen is longer"] == 1 and rows["accuracy, chosen is shorter"] == 0
    assert rows["longer answer chosen"] == pytest.approx(1.5 / 3)


def test_scorers_are_named():
    assert load_scorer("math:sqrt") is math.sqrt
    for name, word in (("math", "MODULE:FUNCTION"), ("math:nothing", "cannot be imported"),
                       ("math:pi", "not a function")):
        with pytest.raises(UserError, match=word):
            load_scorer(name)
    mean, share = toxicity_rows([0.1, 0.5, 0.9])
    assert mean.value == pytest.approx(0.5) and share.value == pytest.approx(2 / 3)


@pytest.mark.parametrize("count, length", [(0, 4), (3, 4), (4, 4), (5, 4), (12, 4), (13, 5),
                                           (1, 1)])
def test_windows_predict_each_token_once(count, length):
    ids, seen = list(range(100, 100 + count)), []
    for context, predicted in rolling_windows(ids, 7, length):
        assert len(context) >= 1 and len(context) + len(predicted) <= length + 1
        whole = [7, *ids]
        at = whole.index(predicted[0])
        assert context == whole[at - len(context) : at]
        seen += predicted
    assert seen == ids
