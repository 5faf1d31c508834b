"""What is over the limits, and which of a response's tokens are learnt."""

import json

import numpy as np
import pytest
import torch

from megatron_irl.data.answers import same_answer
from megatron_irl.data.demonstrations import Limits, load_demonstrations
from megatron_irl.data.digest import digest_of
from megatron_irl.data.packing import pack
from megatron_irl.data.preferences import load_preferences
from megatron_irl.data.tokenizer import load_tokenizer
from tests.unit.data.shapes import TEMPLATES, write_tokenizer


@pytest.mark.parametrize(("prompt", "bos", "limit", "cut"), [
    ([1, 5, 6, 7], 1, 3, [1, 6, 7]),  # BOS stays, the oldest of the rest go
    ([5, 6, 7, 8], 1, 3, [6, 7, 8]),  # there was none
    ([5, 6, 7, 8], None, 3, [6, 7, 8]), ([1, 5, 6], 1, 3, [1, 5, 6]), ([1, 5, 6], 1, 1, [6]),
    ([1, 5, 6], 1, 2, [1, 6]),
])
def test_a_cut_prompt_keeps_its_bos(prompt, bos, limit, cut):
    assert Limits(limit, 9, "truncate_prompt").cut(prompt, bos) == cut


@pytest.mark.parametrize("kind", ["llama2", "tekken", "llama3"])
def test_cut_demonstrations_and_preferences_keep_their_bos(tmp_path, kind):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", kind, TEMPLATES["mistral"]))
    before = [{"role": "user", "content": "What is the capital of Peru? " * 9}]
    says = [{"role": "assistant", "content": text} for text in ("Lima", "Rome")]
    limits = {"max_prompt_length": 12, "max_response_length": 50, "overlong": "truncate_prompt"}
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": [*before, says[0]]}))
    (tmp_path / "p.jsonl").write_text(json.dumps(
        {"chosen": [*before, says[0]], "rejected": [*before, says[1]]}))
    (demonstration,), report = load_demonstrations(tmp_path / "d.jsonl", tokenizer, **limits)
    (preference,) = load_preferences(tmp_path / "p.jsonl", tokenizer, **limits)
    for ids in (demonstration.prompt_ids, preference.prompt_ids):
        assert len(ids) == 12 and ids[0] == tokenizer.bos_id != ids[1]
    assert report.truncated_prompts == 1 and report.prompt_lengths[0] > 12
    assert demonstration.response_ids.tolist() == preference.chosen_ids.tolist()


@pytest.mark.parametrize(("response", "answer", "same"), [
    ("1", "1", True), ("1", "1.0", True), (" 1\n", "1.00", True), ("1.0", "1", True),
    ("-3", "-3.0", True), ("1e2", "100", True), ("0.5", ".5", True), ("Lima", " Lima", True),
    ("2", "1.0", False), ("1.01", "1", False), ("Lima", "lima", False), ("", "0", False),
    ("nan", "NaN", False), ("nan", "nan", True), ("1_0", "10", False), ("one", "1", False),
    ("12345678901234567890", "12345678901234567891", False), ("inf", "infinity", False),
])
def test_one_number_is_one_answer(response, answer, same):
    assert same_answer(response, answer) is same


def test_only_marked_tokens_of_a_response_have_a_row():
    mask = np.array([True, False, False, True, True])
    sequences = [([1, 2], [3, 4, 5, 6, 7]), ([8], [9, 10])]
    batch = pack(sequences, None, loss_masks=[mask, None], multiple_of=8, pad_id=0)
    whole = pack(sequences, None, multiple_of=8, pad_id=0)
    assert batch.targets_R.tolist() == [3, 6, 7, 9, 10]
    assert batch.rows_R.tolist() == [1, 4, 5, 7, 8]
    assert batch.segment_R.tolist() == [0, 0, 0, 1, 1]
    assert batch.lengths_S.tolist() == [3, 2]
    for name in ("tokens_T", "position_ids_T", "cu_seqlens", "final_S"):
        assert torch.equal(getattr(batch, name), getattr(whole, name))
    unmasked = pack(sequences, None, loss_masks=[None, None], multiple_of=8, pad_id=0)
    assert torch.equal(unmasked.rows_R, whole.rows_R)


@pytest.mark.parametrize("mask", [[True, True], [False] * 5, [True] * 6])
def test_masks_that_do_not_fit_are_refused(mask):
    with pytest.raises(ValueError, match="loss_masks of"):
        pack([([1, 2], [3, 4, 5, 6, 7])], None, loss_masks=[np.array(mask)])


def test_the_digest_tells_what_is_learnt():
    sequences = [(np.array([1, 2]), np.array([3, 4])), (np.array([5]), np.array([6, 7]))]
    masks = [[None, None], [np.array([True, False]), None], [None, np.array([True, False])],
             [np.array([False, True]), None]]
    digests = [digest_of(sequences, each) for each in masks]
    assert digests[0] == digest_of(sequences) and len(set(digests)) == 4
