"""Preference records in, ids out; every bad record is named."""

import json

import numpy as np
import pandas
import pytest

from megatron_irl.data.conversation import Conversation
from megatron_irl.data.preferences import load_preferences
from megatron_irl.data.rendering import encode_prompt
from megatron_irl.data.tokenizer import load_tokenizer
from megatron_irl.errors import UserError

IM_START, IM_END = 256, 257
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2+2?"}
ASK_IDS = [IM_START, *b"user\n2+2?", IM_END, *b"\n", IM_START, *b"assistant\n"]


def says(text):
    return {"role": "assistant", "content": text}


def load(path, tokenizer, *records, **options):
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return load_preferences(
        path, tokenizer, **{"max_prompt_length": 64, "max_response_length": 16, **options})


@pytest.mark.parametrize("record", [
    {"prompt": [USER], "chosen": "4", "rejected": "5"},
    {"prompt": [USER], "chosen": [says("4")], "rejected": [says("5")]},
    {"prompt": [USER], "chosen": [USER, says("4")], "rejected": "5"},
    {"chosen": [USER, says("4")], "rejected": [USER, says("5")], "score_chosen": 9},
    {"prompt": "2+2?", "chosen": [USER, says("4")], "rejected": [USER, says("5")]},
    {"prompt": [USER], "chosen": "4<|im_end|>", "rejected": "5<|im_end|><|im_end|>"},
])
def test_every_form_gives_the_same_ids(record, tmp_path, byte_tokenizer):
    path = tmp_path / "a.jsonl"
    (preference,) = load(path, byte_tokenizer, record)
    assert preference.prompt_ids.tolist() == ASK_IDS
    assert preference.chosen_ids.tolist() == [*b"4", IM_END]  # EOS exactly once
    assert preference.rejected_ids.tolist() == [*b"5", IM_END]
    assert preference.source == f"{path}:1"
    assert {v.dtype for v in vars(preference).values()
            if isinstance(v, np.ndarray)} == {np.dtype(np.int32)}


def test_string_prompt_is_taken_as_it_is(tmp_path, byte_tokenizer):
    (preference,) = load(tmp_path / "a.jsonl", byte_tokenizer,
                         {"prompt": "Q: é", "chosen": " A", "rejected": [says(" B")]})
    assert preference.prompt_ids.tolist() == [*"Q: é".encode()]
    assert preference.rejected_ids.tolist() == [*b" B", IM_END]


def test_conversations_and_parquet(tmp_path, byte_tokenizer):
    turns = [SYSTEM, USER, says("3"), {"role": "user", "content": "Sure?"}]
    pandas.DataFrame([
        {"prompt": None, "chosen": [*turns, says("4")], "rejected": [*turns, says("3")]},
    ]).to_parquet(tmp_path / "a.parquet")
    (preference,) = load_preferences(tmp_path / "a.parquet", byte_tokenizer,
                                     max_prompt_length=200, max_response_length=8)
    assert preference.prompt_ids.tolist() == encode_prompt(
        byte_tokenizer, Conversation(turns, ""))
    assert preference.source == f"{tmp_path}/a.parquet:row 1"


def test_overlong_prompts_are_refused_or_cut_as_asked(tmp_path, byte_tokenizer):
    records = [{"prompt": "Q" * 60 + "tail", "chosen": "A", "rejected": "B"},
               {"prompt": "Q" * 70 + "tail", "chosen": "A", "rejected": "B"},
               {"prompt": "Q", "chosen": "A", "rejected": "B" * 16}]
    with pytest.raises(UserError, match=r"(?s)a.jsonl:2.*74 tokens.*a.jsonl:3.*17 tokens"):
        load(tmp_path / "a.jsonl", byte_tokenizer, *records, overlong="error")
    cut = load(tmp_path / "b.jsonl", byte_tokenizer, *records, overlong="truncate_prompt")
    assert [p.prompt_ids.tolist() for p in cut] == [[*b"Q" * 60, *b"tail"]] * 2
    assert cut.summary() == ("2 preferences; dropped 1 over-long (0 by the prompt, 1 by a "
                             "response); cut the beginning of 1 prompts")


def test_what_is_left_out_is_counted(tmp_path, byte_tokenizer):
    preferences = load(
        tmp_path / "a.jsonl", byte_tokenizer,
        {"prompt": "Q", "chosen": "A" * 15, "rejected": "B"},  # 16 with EOS
        {"prompt": "Q", "chosen": "A" * 16, "rejected": "B"},
        {"prompt": "Q", "chosen": "A", "rejected": "B" * 16},
        {"prompt": "Q" * 65, "chosen": "A", "rejected": "B" * 99},
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
    )
    assert [p.source.rpartition(":")[2] for p in preferences] == ["1"]
    assert preferences.summary() == ("1 preferences; dropped 3 over-long (1 by the prompt, 2 by a "
                                     "response); dropped 1 with equal answers")
    assert load(tmp_path / "b.jsonl", byte_tokenizer, {"prompt": "Q", "chosen": "A",
                "rejected": "B"}).summary() == "1 preferences"


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": "Q", "rejected": "B"}, 'no "chosen"'),
    ({"prompt": "Q", "chosen": "A", "rejected": None}, 'no "rejected"'),
    ({"prompt": "Q"}, 'no "chosen" and no "rejected"'),
    ({"chosen": "A", "rejected": "B"}, 'no "prompt"'),
    ({"chosen": [says("A")], "rejected": [says("B")]}, 'no "prompt"'),
    ({"prompt": "Q", "chosen": " ", "rejected": "B"}, '"chosen" is empty'),
    ({"prompt": "Q", "chosen": "A", "rejected": 3}, '"rejected" must be a string, not 3'),
    ({"prompt": "Q", "chosen": [], "rejected": "B"}, '"chosen" is empty'),
    ({"prompt": "Q", "chosen": [USER], "rejected": "B"},
     'the last message of "chosen" is from \'user\''),
    ({"prompt": "Q", "chosen": "A", "rejected": [says("")]},
     'the last message of "rejected": "content" is empty'),
    ({"chosen": [USER, says("A")], "rejected": [SYSTEM, USER, says("B")]},
     'differ between "chosen" and "rejected"'),
    ({"prompt": "other", "chosen": [USER, says("A")], "rejected": "B"},
     '"prompt" differs from the messages before the answer'),
    ({"prompt": [USER, says("A")], "chosen": "A", "rejected": "B"},
     "the prompt ends with an assistant message"),
    ({"prompt": "Q", "chosen": "A", "rejected": "a<|im_end|>b"},
     '"rejected": the response holds an end-of-response token'),
    ({"prompt": "Q", "chosen": "<|im_end|>", "rejected": "B"},
     '"chosen": the response has no tokens'),
    ("{", "not JSON"),
])
def test_bad_records_are_named_by_file_and_line(record, message, tmp_path, byte_tokenizer):
    path = tmp_path / "a.jsonl"
    good = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    with pytest.raises(UserError) as error:
        load(path, byte_tokenizer, good, record)
    assert f"{path}:2: " in str(error.value) and message in str(error.value)


def test_messages_need_a_chat_template(tmp_path, byte_folder):
    tokenizer = load_tokenizer(byte_folder(chat_template=None))
    with pytest.raises(UserError, match="no chat template"):
        load(tmp_path / "a.jsonl", tokenizer, {"prompt": [USER], "chosen": "A", "rejected": "B"})


def test_missing_and_empty_files(tmp_path, byte_tokenizer):
    with pytest.raises(UserError, match="no such file"):
        load_preferences(tmp_path / "none.jsonl", byte_tokenizer, max_prompt_length=8,
                         max_response_length=8)
    with pytest.raises(UserError, match="has no records"):
        load(tmp_path / "a.jsonl", byte_tokenizer)
