"""Public data sets as they lie on the hub, and what people make of them, become conversations."""

import json

import pandas
import pytest

from megatron_irl.data.records import collect
from megatron_irl.data.sources import Reading
from megatron_irl.errors import UserError
from tests.unit.data import hub_files

USER, GOOD = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def conversations(reading, purpose="demonstration"):
    return [each for found in collect(reading, lambda found, _: found, purpose) for each in found]


def read_one(tmp_path, record, purpose="demonstration", **options):
    path = write(tmp_path / "one.jsonl", record)
    (found,) = conversations(Reading((path,), **options), purpose)
    return found


def turns(messages):
    return [(m["role"], m["content"]) for m in messages]


@pytest.mark.parametrize("make", hub_files.FILES, ids=lambda make: make.__name__)
def test_hub_file_is_read_without_being_told_how(make, tmp_path):
    path, expected = make(tmp_path)
    notes = []
    found = conversations(Reading((path,), notes=notes))
    assert [turns(each.messages) for each in found] == expected
    assert not any(each.plain for each in found)
    assert all(each.source.startswith(f"{path}:") for each in found)
    (note,) = notes
    assert note.startswith(f"{path}: {len(expected)} records as ")
    assert expected[0][-2][1][:20] in note, "no record is shown"
    # The same file as prompts: everything but the last answer.
    asked = conversations(path, "prompt")
    assert [turns(each.messages) for each in asked] == [each[:-1] for each in expected]
    # And to be scored: the answers of the file.
    scored = conversations(path, "score")
    assert turns(scored[0].messages) == expected[0]


def test_answers_for_exact_match(tmp_path):
    path, _ = hub_files.gsm8k(tmp_path)
    assert [each.answer for each in conversations(path)] == ["7", "15", "17"]
    for record, answer in [
        ({"question": "Q", "answer": "free text"}, None),
        ({"problem": "Q", "solution": "so it is 3", "answer": "3"}, "3"),
        ({"messages": [USER, GOOD], "answer": 4}, "4"),
        ({"messages": [USER, GOOD], "answer": 4.0}, "4"),
        ({"messages": [USER, GOOD], "answer": 0.5}, "0.5"),
        ({"messages": [USER, GOOD], "answer": float("nan")}, None),
        ({"messages": [USER, GOOD], "answer": None}, None),
    ]:
        assert read_one(tmp_path, record).answer == answer, record


def test_answers_of_a_column_with_a_gap(tmp_path):
    """pandas makes floats of integers of which one is missing."""
    frame = pandas.DataFrame({"prompt": ["a", "b"], "response": ["1", "2"], "answer": [1, None]})
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert [each.answer for each in conversations(tmp_path / name)] == ["1", None]


@pytest.mark.parametrize("answer", [True, ["4"], {"text": ["4"]}, float("inf")])
def test_answers_that_are_none(tmp_path, answer):
    with pytest.raises(UserError, match=r'one\.jsonl:1: "answer" must be'):
        read_one(tmp_path, {"messages": [USER, GOOD], "answer": answer})


QA = [("user", "2+2?"), ("assistant", "4")]


@pytest.mark.parametrize("record", [
    {"messages": json.dumps([USER, GOOD])},
    {"messages": {"role": ["user", "assistant"], "content": ["2+2?", "4"]}},
    {"messages": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    {"messages": [{"role": "User", "content": "2+2?"}, {"role": "model", "content": "4"}]},
    {"messages": [USER, {"role": "assistant", "content": [
        {"type": "text", "text": "4"}, {"type": "text", "text": ""}]}]},
    {"conversation": [USER, GOOD]},
    {"dialog": [USER, GOOD], "id": 3, "meta": {"a": [1]}},
    {"prompt": [USER], "completion": [GOOD]},
    {"prompt": [USER], "response": [GOOD]},
    {"prompt": [USER], "response": "4"},
    {"prompt": "2+2?", "messages": [USER, GOOD]},
    {"query": "2+2?", "response": "4"},
    {"question": "2+2?", "answer": "4"},
    {"input": "2+2?", "output": "4"},
    {"inputs": "2+2?", "targets": "4", "language": "eng"},
    {"problem": "2+2?", "solution": "4"},
    {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, {**GOOD, "content": "5"}]},
    {"question": "2+2?", "chosen": "4", "rejected": "5"},
    {"conversations": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"},
     "rejected": {"from": "gpt", "value": "5"}},
    {"prompt": {"text": "2+2?", "role": "prompter", "replies": [
        {"text": "5", "role": "assistant", "rank": 1, "replies": []},
        {"text": "4", "role": "assistant", "rank": 0, "replies": []}]}},
    {"text": "### Human: 2+2?### Assistant: 4"},
])
def test_one_conversation_in_many_forms(tmp_path, record):
    found = read_one(tmp_path, record)
    assert turns(found.messages) == QA and not found.plain


def test_strings_of_prompt_and_response_are_taken_as_they_are(tmp_path):
    for key in ("response", "completion"):
        found = read_one(tmp_path, {"prompt": " Q:", key: " A\n"})
        assert found.plain and turns(found.messages) == [("user", " Q:"), ("assistant", " A\n")]
    with_system = read_one(tmp_path, {"prompt": "Q", "response": "A", "system": "S"})
    assert not with_system.plain  # a system turn is one of a chat
    assert turns(with_system.messages) == [("system", "S"), ("user", "Q"), ("assistant", "A")]


def test_system_texts_beside_the_conversation(tmp_path):
    for record in ({"system_prompt": "S", "question": "2+2?", "response": "4"},
                   {"system": "S", "conversations": [USER, GOOD]},
                   {"messages": [{"role": "developer", "content": "S"}, USER, GOOD]}):
        assert turns(read_one(tmp_path, record).messages) == [("system", "S"), *QA]
    kept = {"system": "other", "messages": [{"role": "system", "content": "S"}, USER, GOOD]}
    assert turns(read_one(tmp_path, kept).messages) == [("system", "S"), *QA]


@pytest.mark.parametrize("call", [
    {"tool_calls": [CALL]},
    {"tool_calls": json.dumps([CALL])},
    {"tool_calls": [{"function": {"name": "add", "arguments": '{"x": 2}'}}]},
    {"tool_calls": [{"name": "add", "arguments": {"x": 2}}]},
    {"function_call": {"name": "add", "arguments": '{"x": 2}'}},
])
def test_tool_calls_have_one_form(tmp_path, call):
    asks = {"role": "assistant", "content": None} | call
    found = read_one(tmp_path, {"messages": [
        USER, asks, {"role": "function", "name": "add", "content": "4"}, GOOD]})
    assert found.messages == [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                              {"role": "tool", "name": "add", "content": "4"}, GOOD]
    last = read_one(tmp_path, {"messages": [USER, asks]})
    assert last.messages[-1]["tool_calls"] == [CALL]


def test_tools_and_sharegpt_calls(tmp_path):
    tool = {"name": "add", "parameters": {}}
    found = read_one(tmp_path, {"conversations": [
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 2}}'},
        {"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"}],
        "tools": json.dumps([tool])})
    assert found.tools == [{"type": "function", "function": tool}]
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.messages[2] == {"role": "tool", "content": "4"}
    path, _ = hub_files.tool_use(tmp_path)
    first = conversations(path)[0]
    assert first.messages[-1]["tool_calls"][0]["function"]["arguments"] == {"x": 3, "y": 4}
    assert first.tools is not None and first.tools[0]["function"]["name"] == "add"


def test_parquet_does_not_fill_calls_with_the_fields_of_others(tmp_path):
    """One column has one type: every object in it has the fields of all."""
    other = {"type": "function", "function": {"name": "negate", "arguments": {"z": 1}}}
    rows = [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
            for call in (CALL, other)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    found = conversations(tmp_path / "a.parquet")
    assert [each.messages[1]["tool_calls"] for each in found] == [[CALL], [other]]


def test_thinking_is_kept_for_the_template(tmp_path):
    parts = [{"type": "thinking", "thinking": "two and two"}, {"type": "text", "text": "4"}]
    for last in ({**GOOD, "reasoning_content": "two and two"},
                 {"role": "assistant", "content": parts}):
        found = read_one(tmp_path, {"messages": [USER, last]})
        assert found.messages[-1] == {**GOOD, "reasoning_content": "two and two"}
    found = read_one(tmp_path, {"messages": [USER, GOOD],
                                "chat_template_kwargs": {"enable_thinking": False}})
    assert found.template_args == {"enable_thinking": False}


@pytest.mark.parametrize(("record", "message"), [
    ({"text": "### Q: 1+1 ### A: 2"}, 'neither "messages" nor "prompt" and "response", nor another '
     "form that is known; its keys are: text"),
    ({"instruction": "Q"}, 'no "output"; its keys are: instruction'),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, GOOD]},
     """content[0] is of the kind 'image_url'; only text can be read"""),
    ({"messages": [{"who": "me", "content": "x"}, GOOD]},
     '"messages"[0]: no "role"; its keys are: who, content'),
    ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": ["x"]}]},
     "a tool call needs a function with a name"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": 3}]}, "must be a list, not 3"),
    ({"messages": {"role": ["user"], "content": ["a", "b"]}}, "lists of different lengths"),
    ({"messages": [USER, GOOD, USER]}, "the last message is from 'user'"),
    ({"messages": [USER, GOOD], "tools": "none"}, '"tools" must be a list of tools, not a string'),
    ({"messages": [USER, GOOD], "chat_template_kwargs": 1}, "must be an object, not 1"),
    ({"prompt": "1+1=", "response": 2}, '"response" must be a string, not 2'),
    ({"prompt": [USER], "response": [USER]}, "the last message of \"response\" is from 'user'"),
])
def test_what_fits_nothing_is_named(tmp_path, record, message):
    with pytest.raises(UserError) as raised:
        read_one(tmp_path, record)
    text = str(raised.value)
    assert text.startswith(f"{tmp_path}/one.jsonl:1: ") and message in text
    assert "\n" not in text


def test_advice_is_given_once(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"text": "x"}] * 4)
    with pytest.raises(UserError) as raised:
        conversations(path)
    assert str(raised.value).count("data.fields={prompt: THEIR_NAME") == 1
    assert str(raised.value).count("its keys are: text") == 4


@pytest.mark.parametrize(("fields", "record", "plain"), [
    ({"prompt": "Q", "response": "A"}, {"Q": "2+2?", "A": "4", "messages": "ignored"}, True),
    ({"question": "Q", "answer": "A"}, {"Q": "2+2?", "A": "4"}, False),
    ({"instruction": "Q", "output": "A", "input": "C"}, {"Q": "2+2?", "A": "4"}, False),
    ({"response": "chosen"}, {"prompt": [USER], "chosen": "4", "rejected": "5"}, False),
    ({"messages": "d", "role": "who", "content": "says"},
     {"d": [{"who": "user", "says": "2+2?"}, {"who": "bot", "says": "4"}]}, False),
    ({"conversations": "d", "from": "who", "value": "says"},
     {"d": [{"who": "user", "says": "2+2?"}, {"who": "bot", "says": "4"}]}, False),
])
def test_fields_map_other_names(tmp_path, fields, record, plain):
    found = read_one(tmp_path, record, fields=fields)
    assert turns(found.messages) == QA and found.plain is plain


def test_fields_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r'one\.jsonl:1: no "Q", which data\.fields\.prompt names; '
                                        r"its keys are: A, q"):
        read_one(tmp_path, {"q": "2+2?", "A": "4"}, fields={"prompt": "Q", "response": "A"})
    with pytest.raises(UserError, match=r"data\.fields\.respnse; did you mean response"):
        read_one(tmp_path, {"q": "2+2?"}, fields={"respnse": "A"})


def test_a_format_admits_no_other(tmp_path):
    both = {"messages": [USER, GOOD], "instruction": "Which?", "output": "This."}
    assert turns(read_one(tmp_path, both).messages) == QA
    assert turns(read_one(tmp_path, both, format="alpaca").messages) == [
        ("user", "Which?"), ("assistant", "This.")]
    with pytest.raises(UserError, match=r'no "prompt"|data\.format=prompt_response'):
        read_one(tmp_path, both, format="prompt_response")
    preferred = {"prompt": "Q", "chosen": "A", "rejected": "B", "response": "C"}
    assert read_one(tmp_path, preferred, format="preference").messages[-1]["content"] == "A"


def test_preferences(tmp_path):
    path, expected = hub_files.hh_rlhf(tmp_path)
    found = conversations(path, "preference")
    assert [turns(each.messages) for each in found] == expected
    assert [turns(each.rejected) for each in found] == [
        [*each[:-1], ("assistant", "No idea.")] for each in expected]
    # Of prompts with a marker at their end, the text is left alone.
    one = read_one(tmp_path, {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " A",
                              "rejected": " B"}, "preference")
    assert one.plain and turns(one.messages) == [("user", "\n\nHuman: Q\n\nAssistant:"),
                                                 ("assistant", " A")]
    scored = conversations(path, "score")
    assert turns(scored[1].messages)[-1] == ("assistant", "No idea.")


def test_mixed_forms_are_counted(tmp_path):
    notes = []
    path = write(tmp_path / "a.jsonl", {"messages": [USER, GOOD]}, {"prompt": "a", "response": "b"},
                 {"messages": [USER, GOOD]})
    conversations(Reading((path,), notes=notes))
    assert notes == [f"{path}: 2 records as messages (messages), 1 records as prompt_response "
                     "(prompt, response); the first: user '2+2?' | assistant '4'"]
