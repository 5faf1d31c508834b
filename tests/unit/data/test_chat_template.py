"""What happens inside a template is said in words, and what it prints does not change overnight."""

import json
from datetime import datetime

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_irl.data.chat_template import ChatTemplate
from megatron_irl.data.conversation import Conversation
from megatron_irl.data.demonstrations import load_demonstrations
from megatron_irl.data.readers import RecordError
from megatron_irl.data.rendering import encode_conversations, encode_prompt
from megatron_irl.data.sources import Reading
from megatron_irl.data.tokenizer import load_tokenizer
from megatron_irl.errors import UserError
from tests.unit.data.conftest import CHATML
from tests.unit.data.shapes import QWEN3, TEMPLATES, write_tokenizer

ASK = {"role": "user", "content": "What is 6 times 7?"}
SAY = {"role": "assistant", "content": "42"}
CALL = {"type": "function", "function": {"name": "times", "arguments": {"a": 6, "b": 7}}}
TOOLS = [{"type": "function", "function": {"name": "times", "parameters": {}}}]

# Knows tools, calls and thinking, as several public ones do.
RICH = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function.name }}("
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }},{% endfor %})</call>"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encode(tokenizer, messages, **more):
    (found,) = encode_conversations(tokenizer, [Conversation(messages, "a.jsonl:1", **more)])
    if isinstance(found, RecordError):
        raise found
    return found


@pytest.mark.parametrize(("template", "message"), [
    ("{{ messages[0]['content'] + 1 }}", "fails on the messages.*TypeError"),
    ("{{ messages[9]['content'] }}", "fails on the messages.*UndefinedError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ messages[0].content.nothing() }}", "fails on the messages"),
    ("{% for k in messages[0].content.items() %}{% endfor %}", "fails on the messages"),
    ("{{ [1][3] ~ {}['a']['b'] }}", "fails on the messages"),
    ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
    ("{{ messages.append(1) }}", "refuses the messages"),  # the sandbox
])
def test_whatever_a_template_raises_is_about_the_record(byte_folder, template, message):
    tokenizer = load_tokenizer(byte_folder(), template)  # not even trying it out raises
    with pytest.raises(RecordError, match=message):
        encode(tokenizer, [ASK, SAY])
    with pytest.raises(RecordError, match=message):
        encode_prompt(tokenizer, Conversation([ASK], "a.jsonl:1"))


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages | no_filter }}",
                                      "{% generation %}{{ 1 }}", "{{ 'a }}"])
def test_what_is_not_jinja_is_refused_at_once(byte_folder, template, tmp_path):
    (tmp_path / "my.jinja").write_text(template)
    with pytest.raises(UserError, match=r"my\.jinja: the chat template is not Jinja.*line 1 of"):
        load_tokenizer(byte_folder(), str(tmp_path / "my.jinja"))


def test_a_refused_system_turn_says_what_to_do(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", "gemma", TEMPLATES["gemma"]))
    with pytest.raises(RecordError, match="no system turn.*into the first user's"):
        encode(tokenizer, [{"role": "system", "content": "Be brief."}, ASK, SAY])


def test_thinking_calls_and_tools_are_rendered_or_refused_by_name(byte_folder):
    folder = byte_folder()
    hf = AutoTokenizer.from_pretrained(folder)
    rich, plain = load_tokenizer(folder, RICH), load_tokenizer(folder, CHATML)
    cases = [
        ([ASK, SAY | {"reasoning_content": "six sevens"}], {}, '"messages"[1]."reasoning_content"'),
        ([ASK, SAY | {"thinking": "six sevens"}], {}, '"messages"[1]."thinking"'),
        ([ASK, SAY | {"content": "", "tool_calls": [CALL]}], {}, '"messages"[1]."tool_calls"'),
        ([ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]},
          {"role": "tool", "content": "42"}, SAY], {}, '"messages"[1]."tool_calls"'),
        ([ASK, SAY], {"tools": TOOLS}, '"tools"'),
    ]
    for messages, more, name in cases:
        found = encode(rich, messages, **more)
        whole = hf.apply_chat_template(messages, chat_template=RICH, return_dict=True, **more)
        assert found.ids == whole["input_ids"][:-1]  # without the line break after the turn
        with pytest.raises(RecordError) as raised:
            encode(plain, messages, **more)
        assert f"leaves out {name}" in str(raised.value)
    # Thinking of earlier turns is left out by templates on purpose.
    earlier = [ASK, SAY | {"reasoning_content": "hm"}, ASK, SAY]
    assert encode(plain, earlier).ids
    with pytest.raises(RecordError, match='leaves out "tools"'):
        encode_prompt(plain, Conversation([ASK], "a.jsonl:1", tools=TOOLS))


def test_arguments_of_the_template_and_of_the_record(tmp_path):
    folder = write_tokenizer(tmp_path / "t", "qwen", QWEN3)
    hf = AutoTokenizer.from_pretrained(folder)
    prompt = Conversation([ASK], "a.jsonl:1")
    texts = {}
    for thinking in (True, False, None):
        arguments = {} if thinking is None else {"enable_thinking": thinking}
        ids = encode_prompt(load_tokenizer(folder, arguments=arguments), prompt)
        assert ids == hf.apply_chat_template(
            [ASK], add_generation_prompt=True, return_dict=True, **arguments)["input_ids"]
        texts[thinking] = hf.decode(ids)
    assert texts[True] == texts[None] and texts[False] == texts[True] + "<think>\n\n</think>\n\n"
    own = Conversation([ASK], "a.jsonl:1", template_args={"enable_thinking": False})
    thinks = load_tokenizer(folder, arguments={"enable_thinking": True})
    assert hf.decode(encode_prompt(thinks, own)) == texts[False]


def test_the_date_is_the_one_given(byte_folder):
    template = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%H:%M') }}|" + CHATML
    folder = byte_folder()
    dates = [datetime(2024, 7, 1), datetime(2025, 12, 31, 23, 59)]
    tokenizers = [load_tokenizer(folder, template, date=date) for date in dates]
    texts = [t.decode(encode(t, [ASK, SAY]).ids) for t in tokenizers]
    assert [text.partition("|")[0] for text in texts] == ["01 Jul 2024 00:00", "31 Dec 2025 23:59"]
    assert tokenizers[0].template.prints_date
    assert not load_tokenizer(folder).template.prints_date
    today = load_tokenizer(folder, template)
    assert f"{datetime.now():%Y}" in today.decode(encode(today, [ASK, SAY]).ids)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("tokenizer.json", '{"version": "9.0", "model": {"type": "Holographic"}}', "cannot be loaded"),
    ("tokenizer.json", "[]", "cannot be loaded"),
    ("tokenizer.json", "", "cannot be loaded"),
    ("tokenizer_config.json", '{"tokenizer_class": 3}', "cannot be loaded"),
    ("chat_template.jinja", "{% if %}", "the chat template is not Jinja"),
    ("generation_config.json", '{"eos_token_id": "<|im_end|>"}', "generation_config.json: eos_tok"),
    ("generation_config.json", '{"eos_token_id": [[257]]}', "generation_config.json: eos_token_id"),
    ("generation_config.json", '{"eos_token_id": true}', "generation_config.json: eos_token_id"),
    ("generation_config.json", "[257]", "generation_config.json cannot be read"),
    ("generation_config.json", "{", "generation_config.json cannot be read"),
    ("config.json", '{"eos_token_id": "</s>"}', "config.json: eos_token_id='</s>'"),
    ("config.json", '{"eos_token_id": -1}', "config.json: eos_token_id=-1"),
])
def test_files_that_are_not_what_they_should_be(byte_folder, name, content, message):
    folder = byte_folder()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("marks", [False, True])
def test_a_text_that_the_tokenizer_fails_on_is_named(tmp_path, marks):
    """A library that raises at a word: the record's message, whatever else is encoded with it."""
    words = ["a", "user", "assistant", "hello", "paris", "7", "yes", "42", "six"]
    vocabulary = {word: i for i, word in enumerate([*words, "<|im_end|>"])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="[UNK]"))  # which there is not
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begin, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    template = ("{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}" + begin +
                "{{ m.content }} <|im_end|> " + end + "{% else %}{{ m.content }} {% endif %}"
                "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}")
    folder = tmp_path / "words"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(
        folder)
    tokenizer = load_tokenizer(folder, template)
    path = tmp_path / "a.jsonl"
    texts = ["42", "seven", "six", "6"]
    path.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]}) + "\n"
        for text in texts))
    limits = {"max_prompt_length": 9, "max_response_length": 9, "turns": "all"}
    with pytest.raises(UserError, match="2 records cannot be used") as raised:
        load_demonstrations(path, tokenizer, **limits)
    for line in (2, 4):
        assert f"{path}:{line}: the tokenizer fails on the text: WordLevel" in str(raised.value)
    found, _ = load_demonstrations(Reading((path,), bad_records="drop"), tokenizer, **limits)
    assert [d.response for d in found] == ["42", "six"]
    asked = Conversation([{"role": "user", "content": "seven"}], "a.jsonl:1")
    with pytest.raises(RecordError, match="fails on the text"):
        encode_prompt(tokenizer, asked)
    vocabulary.pop("hello")
    Backend(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match=f"tokenizer={folder}: the tokenizer fails"):
        load_tokenizer(folder, template)


@pytest.mark.parametrize(("files", "stop_ids"), [
    ({"config.json": 259}, (257, 259)),
    ({"config.json": [258, 259]}, (257, 258, 259)),
    ({"config.json": None}, (257,)),
    ({"config.json": 258, "generation_config.json": [259, 257]}, (257, 259, 258)),
    ({"generation_config.json": 0}, (257, 0)),
])
def test_every_id_that_the_files_list_ends_a_sample(byte_folder, tmp_path, files, stop_ids):
    folder = byte_folder()
    elsewhere = tmp_path / "model"
    elsewhere.mkdir()
    for place in (folder, elsewhere):
        for name, value in files.items():
            (place / name).write_text(json.dumps({"eos_token_id": value}))
    assert load_tokenizer(folder).stop_ids == stop_ids
    for name in files:
        (folder / name).unlink()
    assert load_tokenizer(folder).stop_ids == (257,)
    assert load_tokenizer(folder, model=elsewhere).stop_ids == stop_ids  # a tokenizer kept apart


def test_nested_configuration_lists_ends_too(byte_folder):
    folder = byte_folder()
    (folder / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": [259]}}))
    assert load_tokenizer(folder).stop_ids == (257, 259)


def test_rendering_changes_nothing_of_the_record():
    messages = [ASK, SAY | {"reasoning": "hm"}]
    template = ChatTemplate("{% for m in messages %}{{ m.reasoning_content or '' }}{% endfor %}")
    assert template.render(messages).text == "hm"
    assert messages[1] == SAY | {"reasoning": "hm"}
