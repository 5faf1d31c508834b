"""Which turns are learnt: ids and masks by transformers, or by each turn as its own record."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_irl.data.conversation import Conversation
from megatron_irl.data.demonstrations import load_demonstrations
from megatron_irl.data.readers import RecordError
from megatron_irl.data.rendering import encode_conversations
from megatron_irl.data.tokenizer import load_tokenizer
from megatron_irl.data.turns import conversations_of, encode_turns
from tests.unit.data.shapes import TEMPLATES, write_tokenizer


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


TALK = [
    turn("system", "You are brief."), turn("user", "What is the capital of Peru?"),
    turn("assistant", "Lima is the capital."), turn("user", "And of Italy?"),
    turn("assistant", "Rome, 42 more: yes."), turn("user", "hello"),
    turn("assistant", "Hi, there."),
]
PAIR = TALK[1:5]
TALKS = [TALK, PAIR, TALK[1:3], [*PAIR, turn("user", "é\n"), turn("assistant", " naïve\n")]]


def marked(template, content):
    """The template with generation markers around what it writes for the assistant's content."""
    before, after = template.split(content)
    return (before + "{% if m.role == 'assistant' %}{% generation %}" + content +
            "{% endgeneration %}{% else %}" + content + "{% endif %}" + after)


# name -> (tokenizer, template with markers): the turn's end is inside the markers
MARKED = {
    "llama3": ("llama3", marked(
        "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' }}"
        "BODY{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}", "BODY")
        .replace("BODY", "{{ m.content | trim + '<|eot|>' }}")),
    "mistral": ("tekken", "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
                "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}"
                "{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% endfor %}"),
    "qwen25": ("qwen", marked(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "BODY")
        .replace("BODY", "{{ m.content + '<|im_end|>' }}")),
    "qwen3": ("qwen", "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
              "{% if m.role == 'assistant' %}{% generation %}{{ '<think>\n\n</think>\n\n' + "
              "m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
              "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
    "gemma": ("chatml", marked(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}BODY{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}", "BODY")
        .replace("BODY", "{{ m.content | trim + '<|end|>' }}")),
    "chatml": ("chatml", marked(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "BODY")
        .replace("BODY", "{{ m.content + '<|im_end|>' }}")),
    "zephyr": ("zephyr", marked(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}BODY{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}", "BODY")
        .replace("BODY", "{{ m.content + eos_token }}")),
    "phi": ("chatml", marked(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}BODY{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "BODY").replace("BODY", "{{ m.content + '<|end|>' }}")),
    "llama2": ("llama2", "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
               "{{ ' ' + m.content + ' ' + eos_token }}{% endgeneration %}{% else %}"
               "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"),
}


def learnt(encoded):
    mask = np.zeros(len(encoded.ids), dtype=int)
    for start, end in encoded.spans:
        mask[start:end] = 1
    return mask.tolist()


def all_turns(tokenizer, messages):
    (found,) = encode_turns(tokenizer, [Conversation(messages, "a.jsonl:1")], "all")
    assert not isinstance(found, RecordError), found
    return found


@pytest.mark.parametrize("name", MARKED)
def test_ids_and_masks_of_marked_templates_are_those_of_transformers(tmp_path, name):
    kind, template = MARKED[name]
    folder = write_tokenizer(tmp_path / "t", kind, template)
    hf, tokenizer = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for messages in TALKS:
        if kind == "chatml" and messages is TALKS[3] and "trim" not in template:
            continue  # its offsets leave a first space out, where transformers then finds no token
        expected = hf.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True)
        ((_, encoded),) = all_turns(tokenizer, messages)
        count = len(encoded.ids)
        assert encoded.ids == expected["input_ids"][:count]
        assert learnt(encoded) == expected["assistant_masks"][:count]
        assert not any(expected["assistant_masks"][count:])
        assert not encoded.remarks


@pytest.mark.parametrize("name", MARKED)
def test_markers_and_prefix_differences_agree(tmp_path, name):
    """The same template without its markers gives the same tokens to learn."""
    kind, template = MARKED[name]
    bare = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with_markers = load_tokenizer(write_tokenizer(tmp_path / "a", kind, template))
    without = load_tokenizer(write_tokenizer(tmp_path / "b", kind, bare))
    for messages in TALKS:
        ((_, first),), ((_, second),) = (all_turns(t, messages) for t in (with_markers, without))
        assert (first.ids, learnt(first)) == (second.ids, learnt(second))


@pytest.mark.parametrize("name", ["llama3", "chatml", "zephyr", "phi", "trim", "qwen25"])
def test_all_is_each_laid_into_one_sequence(tmp_path, name):
    kind = {"llama3": "llama3", "zephyr": "zephyr", "phi": "chatml"}.get(name, "qwen")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", kind, TEMPLATES[name]))
    for messages in TALKS:
        ((_, encoded),) = all_turns(tokenizer, messages)
        conversations = conversations_of(Conversation(messages, "a.jsonl:1"), "each")
        each = encode_conversations(tokenizer, conversations)
        assert len(encoded.spans) == len(each) == sum(m["role"] == "assistant" for m in messages)
        for (start, end), alone in zip(encoded.spans, each, strict=True):
            assert encoded.ids[:start] == alone.prompt_ids
            assert encoded.ids[start:end] == alone.response_ids
            assert encoded.ids[end - 1] == tokenizer.eos_id


def test_a_template_that_rewrites_earlier_turns_falls_back_to_each(tmp_path):
    """Thinking of earlier turns is left out once another question follows."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", "qwen", TEMPLATES["qwen3"]))
    found = all_turns(tokenizer, PAIR)
    assert [encoded.remarks for _, encoded in found] == [("unstable_turns",)] * 2
    alone = encode_turns(tokenizer, [Conversation(PAIR, "a.jsonl:1")], "each")[0]
    assert [e.ids for _, e in found] == [e.ids for _, e in alone]
    ((_, single),) = all_turns(tokenizer, PAIR[:2])  # nothing earlier, nothing to rewrite
    assert not single.remarks


def test_markers_that_leave_out_the_end_are_noticed(tmp_path):
    template = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% generation %}"
                "{{ m.content if m.role == 'assistant' }}{% endgeneration %}"
                "{{ m.content if m.role != 'assistant' }}{{ '<|im_end|>\n' }}{% endfor %}")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", "qwen", template))
    ((_, encoded),) = all_turns(tokenizer, PAIR)
    assert encoded.remarks == ("unmarked_end",)
    tokenizer = load_tokenizer(tmp_path / "t", template.replace("== 'assistant'", "== 'nobody'"))
    (found,) = encode_turns(tokenizer, [Conversation(PAIR, "a.jsonl:1")], "all")
    assert isinstance(found, RecordError) and "marks nothing" in str(found)


def test_sources_and_answers_of_turns():
    whole = Conversation(TALK, "a.jsonl:7", answer="42", template_args={"x": 1})
    parts = conversations_of(whole, "each")
    assert [p.source for p in parts] == ["a.jsonl:7 turn 1", "a.jsonl:7 turn 2", "a.jsonl:7"]
    assert [p.answer for p in parts] == [None, None, "42"]
    assert [len(p.messages) for p in parts] == [3, 5, 7]
    assert all(p.template_args == {"x": 1} for p in parts)
    assert conversations_of(whole, "last") == [whole]
    plain = Conversation([turn("user", "Q"), turn("assistant", "A")], "a.jsonl:8", plain=True)
    assert conversations_of(plain, "each") == [plain]


def test_demonstrations_of_every_kind_of_turns(tmp_path):
    folder = write_tokenizer(tmp_path / "t", "qwen", TEMPLATES["chatml"])
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": m, "answer": "x"}) + "\n" for m in TALKS))
    tokenizer = load_tokenizer(folder)
    limits = {"max_prompt_length": 200, "max_response_length": 200}
    loaded = {turns: load_demonstrations(path, tokenizer, turns=turns, **limits)[0]
              for turns in ("last", "each", "all")}
    assert [len(loaded[t]) for t in ("last", "each", "all")] == [4, 9, 4]
    assert [d.ordinal for d in loaded["each"]] == list(range(9))
    assert all(d.loss_mask is None for d in loaded["last"] + loaded["each"])
    assert [d.loss_mask is None for d in loaded["all"]] == [False, False, True, False]
    count = sum(len(d.response_ids) for d in loaded["each"])
    masks = [d.loss_mask for d in loaded["all"] if d.loss_mask is not None]
    assert sum(m.sum() for m in masks) + len(loaded["all"][2].response_ids) == count
    assert all(len(d.loss_mask) == len(d.response_ids)
               for d in loaded["all"] if d.loss_mask is not None)
