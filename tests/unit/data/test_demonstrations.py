"""Records in, ids and counts out; every bad record is named."""

import gzip
import json
import os

import numpy as np
import pandas
import pytest

from megatron_irl.data import records
from megatron_irl.data.demonstrations import load_demonstrations
from megatron_irl.data.prompts import load_prompts, load_score_records
from megatron_irl.data.tokenizer import load_tokenizer
from megatron_irl.errors import UserError
from megatron_irl.storage.commit import replacing, write_jsonl_atomically

IM_START, IM_END = 256, 257
USER, GOOD = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
ASK_IDS = [IM_START, *b"user\n2+2?", IM_END, *b"\n", IM_START, *b"assistant\n"]


def write_lines(path, *lines):
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


def load(path, tokenizer, **options):
    limits = {"max_prompt_length": 64, "max_response_length": 64}
    return load_demonstrations(path, tokenizer, **limits | options)


def test_ids_text_and_report(tmp_path, byte_tokenizer):
    path = write_lines(
        tmp_path / "a.jsonl",
        {"messages": [USER, GOOD], "answer": "4"},
        {"prompt": [USER], "response": "4", "answer": 4},
        {"prompt": "Q: é", "response": " A\n", "ignored": [1]},
    )
    demonstrations, report = load(path, byte_tokenizer)
    first, second, third = demonstrations
    assert first.prompt_ids.tolist() == second.prompt_ids.tolist() == ASK_IDS
    assert first.response_ids.tolist() == [*b"4", IM_END]
    assert first.prompt_ids.dtype == first.response_ids.dtype == np.int32
    assert (first.prompt, first.response, first.answer) == ([USER], "4", "4")
    assert (second.prompt, second.answer, third.answer) == ([USER], "4", None)
    assert third.prompt_ids.tolist() == [*"Q: é".encode()]
    assert third.response_ids.tolist() == [*b" A\n", IM_END]
    assert [d.ordinal for d in demonstrations] == [0, 1, 2]
    assert [d.source for d in demonstrations] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert report.kept == 3 and report.dropped == 0
    assert report.prompt_tokens == 2 * len(ASK_IDS) + 5
    assert report.response_tokens == 2 + 2 + 4
    assert report.summary() == (
        f"3 demonstrations ({2 * len(ASK_IDS) + 5} prompt tokens, 8 response tokens)")


def test_eos_is_kept_where_pad_is_eos(byte_tokenizer, tmp_path):
    assert byte_tokenizer.pad_id == byte_tokenizer.eos_id
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "Q", "response": "A<|im_end|>"})
    (demonstration,), report = load(path, byte_tokenizer)
    assert demonstration.response_ids.tolist() == [*b"A", IM_END]
    assert report.response_tokens == 2


def test_parquet_gzip_and_several_files(tmp_path, byte_tokenizer):
    rows = [{"messages": [USER, GOOD], "answer": None, "prompt": None},
            {"messages": [{"role": "system", "content": "Be brief."}, USER, GOOD], "answer": "4",
             "prompt": None}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "Q", "response": "A"}))
    demonstrations, report = load([tmp_path / "a.parquet", tmp_path / "b.jsonl.gz"],
                                  byte_tokenizer)
    assert [d.source for d in demonstrations] == [
        f"{tmp_path}/a.parquet:row 1", f"{tmp_path}/a.parquet:row 2", f"{tmp_path}/b.jsonl.gz:1"]
    assert demonstrations[0].prompt_ids.tolist() == ASK_IDS
    assert [d.ordinal for d in demonstrations] == [0, 1, 2]
    assert [d.answer for d in demonstrations] == [None, "4", None]
    assert report.kept == 3


BAD_RECORDS = [
    ("{", "not JSON"),
    ("[1]", "must be a JSON object, not a list"),
    ({}, 'neither "messages" nor'),
    ({"prompt": "Q"}, 'no "response"'),
    ({"response": "A"}, 'no "prompt"'),
    ({"prompt": "Q", "response": ""}, '"response" is empty'),
    ({"prompt": "Q", "response": "<|im_end|>"}, "the response has no tokens"),
    ({"prompt": "Q", "response": "a<|im_end|>b"}, "end-of-response token inside"),
    ({"prompt": " ", "response": "A"}, '"prompt" is empty'),
    ({"prompt": 3, "response": "A"}, '"prompt" must be a string, not 3'),
    ({"prompt": "Q", "response": ["A"]}, '"response" must be a string, not a list'),
    ({"prompt": "Q", "response": "A", "answer": ["4"]}, '"answer" must be a string or a number'),
    ({"prompt": "Q", "response": "\ud800"}, "unpaired surrogate"),
    ({"messages": "hello"}, '"messages" must be a list of messages, not a string'),
    ({"messages": []}, '"messages" is empty'),
    ({"messages": [GOOD]}, "the prompt is empty"),
    ({"messages": [{"role": "user", "content": ""}, GOOD]}, "the prompt is empty"),
    ({"messages": [USER]}, "the last message is from 'user'"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, '"content" is empty'),
    ({"messages": [{"role": "narrator", "content": "Q"}, GOOD]}, "role 'narrator' is none of"),
    ({"messages": ["Q", GOOD]}, '"messages"[0] must be an object'),
    ({"messages": [{"role": "user"}, GOOD]}, '"messages"[0]: content must be a string, not null'),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}, GOOD]},
     '"messages"[0]: content[0]: text must be a string, not null'),
    ({"prompt": [USER, GOOD], "response": "A"}, "ends with an assistant message"),
]


@pytest.mark.parametrize("record, message", BAD_RECORDS)
def test_bad_record_is_named_by_file_and_line(tmp_path, byte_tokenizer, record, message):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "Q", "response": "A"}, record)
    with pytest.raises(UserError) as raised:
        load(path, byte_tokenizer)
    assert str(raised.value).startswith(f"{path}:2: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_bytes_and_bad_parquet_row(tmp_path, byte_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: not UTF-8"):
        load(tmp_path / "a.jsonl", byte_tokenizer)
    pandas.DataFrame({"prompt": ["Q", "Q"], "response": ["A", None]}).to_parquet(
        tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r'b\.parquet:row 2: no "response"'):
        load(tmp_path / "b.parquet", byte_tokenizer)


def test_byte_order_mark_and_windows_line_ends(tmp_path, byte_tokenizer):
    line = json.dumps({"prompt": "Q", "response": "A"}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\r\n")
    assert load(tmp_path / "a.jsonl", byte_tokenizer)[1].kept == 2


@pytest.mark.parametrize("batch_size", [1, 2, 3, 128])
def test_errors_keep_the_order_of_the_lines(tmp_path, byte_tokenizer, monkeypatch, batch_size):
    """Found before the tokenizer sees a record or after: the message is that of the lines."""
    monkeypatch.setattr(records, "BATCH_SIZE", batch_size)
    good, inside = {"prompt": "Q", "response": "A"}, {"prompt": "Q", "response": "<|im_end|>A"}
    path = write_lines(tmp_path / "a.jsonl", good, inside, "[]", good, inside,
                       {"prompt": "Q", "response": "A", "answer": []}, {"prompt": "Q"})
    with pytest.raises(UserError) as raised:
        load(path, byte_tokenizer)
    token = "the response holds an end-of-response token inside its text"
    *lines, advice = [line.strip() for line in str(raised.value).splitlines()]
    assert "data.fields={prompt: THEIR_NAME" in advice and "data.bad_records=drop" in advice
    assert lines == [
        "5 records cannot be used:", f"{path}:2: {token}",
        f"{path}:3: must be a JSON object, not a list", f"{path}:5: {token}",
        f'{path}:6: "answer" must be a string or a number, not a list',
        f'{path}:7: no "response"; its keys are: prompt']
    demonstrations, _ = load(path, byte_tokenizer, limit=1)  # what follows is not even read
    assert [d.source for d in demonstrations] == [f"{path}:1"]


def test_many_errors_are_one_message_with_the_total(tmp_path, byte_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", *["{"] * 7, {"prompt": "Q", "response": "A"})
    with pytest.raises(UserError) as raised:
        load(path, byte_tokenizer)
    lines = str(raised.value).splitlines()
    assert lines[0] == "7 records cannot be used:"
    assert [line.split(": ")[0].strip() for line in lines[1:6]] == [
        f"{path}:{i}" for i in range(1, 6)]
    assert lines[6:] == ["  ... and 2 more", "data.bad_records=drop leaves such records out."]


def test_leaving_out_every_record_is_no_remedy(tmp_path, byte_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", *['{"prompt": "Q", "response": "A"},'] * 2)
    with pytest.raises(UserError) as raised:
        load(path, byte_tokenizer)
    comma = "a comma follows the record, which JSON lines do not have"
    assert str(raised.value) == (
        f"2 records cannot be used:\n  {path}:1: {comma}\n  {path}:2: {comma}\n"
        "Remove the commas at the ends of lines.")


def test_unusable_files(tmp_path, byte_tokenizer):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bad.jsonl.gz").write_text("no")
    for name, message in [("none.jsonl", "no such file"), ("empty.jsonl", "has no records"),
                          ("a.txt", "unknown kind of file"), ("bad.parquet", "cannot be read"),
                          ("bad.jsonl.gz", "cannot be read")]:
        with pytest.raises(UserError, match=message) as raised:
            load(tmp_path / name, byte_tokenizer)
        assert str(tmp_path / name) in str(raised.value)


def test_template_refusal_names_the_line_and_a_missing_template_does_not_repeat(
        tmp_path, byte_folder):
    path = write_lines(tmp_path / "a.jsonl", *[{"messages": [USER, GOOD]}] * 3)
    folder = byte_folder(chat_template=None)
    with pytest.raises(UserError, match=r"^the data holds message lists"):
        load(path, load_tokenizer(folder))
    with pytest.raises(UserError, match=r"a\.jsonl:1: the chat template refuses"):
        load(path, load_tokenizer(folder, "{{ raise_exception('no') }}"))


OVERLONG = [  # limits: 4 prompt tokens, 3 response tokens with EOS
    {"prompt": "abcd", "response": "xy"},
    {"prompt": "abcde", "response": "xy"},
    {"prompt": "abcd", "response": "xyz"},
    {"prompt": "abcde", "response": "xyz"},
]


@pytest.mark.parametrize("overlong, kept, counts", [
    ("drop", [(b"abcd", b"xy")], (2, 1, 0)),
    ("truncate_prompt", [(b"abcd", b"xy"), (b"bcde", b"xy")], (0, 2, 1)),
])
def test_overlong(tmp_path, byte_tokenizer, overlong, kept, counts):
    path = write_lines(tmp_path / "a.jsonl", *OVERLONG)
    demonstrations, report = load(path, byte_tokenizer, max_prompt_length=4,
                                  max_response_length=3, overlong=overlong)
    assert [(d.prompt_ids.tolist(), d.response_ids.tolist()) for d in demonstrations] == [
        ([*p], [*r, IM_END]) for p, r in kept]
    assert [d.ordinal for d in demonstrations] == list(range(len(kept)))
    assert (report.dropped_prompt, report.dropped_response, report.truncated_prompts) == counts
    assert f"dropped {sum(counts[:2])} over-long" in report.summary()


def test_overlong_error_and_nothing_left(tmp_path, byte_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", *OVERLONG[1:])
    limits = {"max_prompt_length": 4, "max_response_length": 3}
    with pytest.raises(UserError) as raised:
        load(path, byte_tokenizer, overlong="error", **limits)
    assert str(raised.value).startswith("3 records cannot be used:")
    assert (f"{path}:3: prompt has 5 tokens, data.max_prompt_length=4; response has 4 tokens, "
            "data.max_response_length=3; data.overlong=error") in str(raised.value)
    with pytest.raises(UserError, match=r"no demonstration is left .* dropped 3 over-long"):
        load(path, byte_tokenizer, **limits)


def test_limit_counts_what_is_kept_and_reads_no_further(tmp_path, byte_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", OVERLONG[1], OVERLONG[0], OVERLONG[0], "{")
    demonstrations, report = load(path, byte_tokenizer, max_prompt_length=4, limit=2)
    assert [d.source for d in demonstrations] == [f"{path}:2", f"{path}:3"]
    assert (report.kept, report.dropped) == (2, 1)


def test_prompt_and_score_files_keep_the_record(tmp_path):
    prompts = [{"prompt": "Q", "id": 7}, {"prompt": [USER]}]
    loaded = load_prompts(write_lines(tmp_path / "p.jsonl", *prompts))
    assert [p.record for p in loaded] == prompts
    assert [p.prompt for p in loaded] == ["Q", [USER]]
    pairs = [{"prompt": "Q", "responses": ["a", ""], "id": 7}]
    (score,) = load_score_records(write_lines(tmp_path / "s.jsonl", *pairs))
    assert (score.prompt, score.responses, score.record) == ("Q", ["a", ""], pairs[0])
    bad = write_lines(tmp_path / "b.jsonl", {"prompt": ""}, {"responses": ["a"]})
    with pytest.raises(UserError, match=r'b\.jsonl:1: "prompt" is empty'):
        load_prompts(bad)
    for responses in ([], "a", None):
        bad = write_lines(tmp_path / "b.jsonl", {"prompt": "Q", "responses": responses})
        message = 'no "responses"' if responses is None else '"responses" must be a non-empty list'
        with pytest.raises(UserError, match=rf"b\.jsonl:1: .*{message}"):
            load_score_records(bad)


def test_jsonl_round_trip_and_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    records = [{"prompt": "é\u2028\n", "token_ids": [1, 2]}, {"lone": "\ud800"}]
    assert write_jsonl_atomically(path, records) == 2
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == records

    def failing():
        yield {"a": 1}
        raise RuntimeError("generation failed")

    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_jsonl_atomically(path, failing())
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["out.jsonl"]


def test_output_that_cannot_be_a_file(tmp_path):
    for path in (tmp_path, "/dev/null"):
        with pytest.raises(UserError, match="not a regular file"), replacing(path):
            pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), replacing(tmp_path / "file" / "out"):
        pass
