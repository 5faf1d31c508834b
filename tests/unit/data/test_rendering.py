"""One door for text: prompt and response are parts of the whole rendered conversation's ids."""

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_irl.data.conversation import Conversation
from megatron_irl.data.readers import RecordError
from megatron_irl.data.rendering import REMARKS, encode_conversations, encode_prompt
from megatron_irl.data.tokenizer import load_tokenizer
from megatron_irl.errors import UserError
from tests.unit.data.shapes import TEMPLATES, TOKENIZERS, sentencepiece_model, write_tokenizer


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


def asked(answer, question="What is the capital of France?", *before):
    return [*before, turn("user", question), turn("assistant", answer)]


ANSWERS = ["Paris is the capital.", "42", " Paris", "Paris.\n", "\n\nyes, no", "é\u2028 naïve",
           "- one\n- two", "  ", "PARIS: Yes", "<think>\nwell\n</think>\n\nParis", "!?", "\tx"]
CONVERSATIONS = [
    *([turn("user", "What is the capital of France?"), turn("assistant", a)] for a in ANSWERS),
    asked("Rome", "And of Italy? ", turn("user", "hello"), turn("assistant", "Hi, there.")),
    asked("Lima", "Peru\n", turn("system", "You are brief.")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    return {name: write_tokenizer(root / name, name, None) for name in TOKENIZERS}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_response_are_the_whole_rendered_conversation(folders, name, template):
    """Ids and text, by transformers; or the record is refused in words."""
    hf = AutoTokenizer.from_pretrained(folders[name])
    hf.chat_template = TEMPLATES[template]
    tokenizer = load_tokenizer(folders[name], TEMPLATES[template])
    found = encode_conversations(
        tokenizer, [Conversation(messages, "x:1") for messages in CONVERSATIONS])
    num_equal = 0
    for messages, encoded in zip(CONVERSATIONS, found, strict=True):
        if isinstance(encoded, RecordError):
            assert str(encoded), messages
            continue
        num_equal += 1
        text = hf.apply_chat_template(messages, tokenize=False)
        text = text[: len(text) - len(tokenizer.shape.tail_space)]
        whole = hf(text, add_special_tokens=False)["input_ids"]
        ids, end = encoded.ids, encoded.ids[-1]
        assert encoded.prompt_ids + encoded.response_ids == ids
        assert encoded.prompt_ids and len(encoded.response_ids) > 1
        stops = [i for i in encoded.response_ids if i in tokenizer.stop_ids]
        assert stops == [end]  # the end of the turn, once
        if tokenizer.shape.end_id is None:  # nothing of the template's ends it: EOS does
            assert end == hf.eos_token_id
            ids = ids[:-1]
            left = hf.decode(whole[len(ids):])
        else:
            left = hf.decode(whole[len(ids):], skip_special_tokens=True)
        assert ids == whole[: len(ids)] and not left.strip()
        if hf.decode(whole) == text:  # not so where a space is put before every stretch of text
            assert text.startswith(hf.decode(ids))
        prompt = encode_prompt(tokenizer, Conversation(messages[:-1], "x:1"))
        if not encoded.remarks:
            assert prompt == encoded.prompt_ids
        content = messages[-1]["content"]
        if "altered" not in encoded.remarks and content.strip():
            said = tokenizer.response_text(encoded.prompt_ids, encoded.response_ids, plain=False)
            assert said.strip() == content.strip() or "header" in encoded.remarks
    needs_bos = "bos_token" in TEMPLATES[template]
    assert num_equal >= 10 or (needs_bos and hf.bos_token is None), found


PLAIN = [("Question: Peru?\nAnswer:", " Lima"), ("Answer: ", "Rome"), ("The capital is", " Paris."),
         ("Q\n", "\n\nA"), ("4", "2"), ("yes", "\tno"), ("é", "\u2028x"), ("a", " b </s>"),
         ("What is the capital of Peru?", "Lima is the capital.")]


@pytest.mark.parametrize("name", [*TOKENIZERS, "tokenizer.model"])
def test_a_plain_prompt_and_its_response_are_one_text(folders, tmp_path, name):
    """No space appears before a response; generation is given the prompt that training has."""
    if name in TOKENIZERS:
        hf, tokenizer = AutoTokenizer.from_pretrained(folders[name]), load_tokenizer(folders[name])
        encode = hf
        decode = hf.decode
    else:
        (tmp_path / name).write_bytes(sentencepiece_model())
        tokenizer = load_tokenizer(tmp_path)
        reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
        encode, decode = None, reference.decode
    conversations = [Conversation([turn("user", p), turn("assistant", r)], "x:1", plain=True)
                     for p, r in PLAIN]
    for (prompt, response), encoded in zip(
            PLAIN, encode_conversations(tokenizer, conversations), strict=True):
        if isinstance(encoded, RecordError):
            assert (prompt, response) == ("4", "2") and "are one token" in str(encoded)
            continue
        if response.endswith("</s>") and tokenizer.codec.decode_all([tokenizer.eos_id]) == "</s>":
            response = response.removesuffix("</s>")
        whole = encode(prompt + response)["input_ids"] if encode else [
            1, *reference.encode(prompt + response)]
        assert encoded.ids == [*whole, tokenizer.eos_id], (prompt, response)
        assert decode(encoded.ids[len(whole) - len(tokenizer.encode(prompt + response)) :-1]).strip(
            ) == (prompt + response).strip()
        before = encode_prompt(tokenizer, Conversation([turn("user", prompt)], "x:1", plain=True))
        if "merged" in encoded.remarks:
            assert before[: len(encoded.prompt_ids)] == encoded.prompt_ids != before
        else:
            assert before == encoded.prompt_ids
        text = tokenizer.response_text(encoded.prompt_ids, encoded.response_ids, plain=True)
        assert (prompt + response).endswith(text)
        # What was generated scores as it was generated.
        if "merged" not in encoded.remarks:
            again = Conversation([turn("user", prompt), turn("assistant", text)], "x", plain=True)
            assert encode_conversations(tokenizer, [again])[0].ids == encoded.ids


@pytest.mark.parametrize("template", ["zephyr", "llama2", "vicuna", "mistral", "no_end"])
def test_a_sentencepiece_file_puts_no_space_before_a_response(tmp_path, template):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = load_tokenizer(tmp_path, TEMPLATES[template])
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    question, answer = "What is the capital of Peru?", "Lima is the capital."
    messages = [turn("user", question), turn("assistant", answer)]
    (encoded,) = encode_conversations(tokenizer, [Conversation(messages, "x:1")])
    text = tokenizer.template.render(messages).text.rstrip("\n").removesuffix("</s>")
    pieces = [p for part in text.split("<s>") for p in part.split("</s>")]
    control = [c for c in text.replace("</s>", "\x01").replace("<s>", "\x02") if c in "\x01\x02"]
    expected = []
    for piece, mark in zip(pieces, [*control, "\x01"], strict=True):
        expected += reference.encode(piece) if piece else []
        expected.append(2 if mark == "\x01" else 1)
    assert encoded.ids == expected
    said = reference.id_to_piece(encoded.response_ids)
    # Those whose header ends before a space that the template writes.
    assert said[0].startswith("▁") == (template in ("llama2", "no_end", "vicuna"))
    assert encode_prompt(tokenizer, Conversation(messages[:1], "x:1")) == encoded.prompt_ids


def test_the_generation_prompt_that_no_demonstration_has_is_left_out(folders):
    """A template whose prompt opens thinking but whose conversations have none."""
    tokenizer = load_tokenizer(folders["qwen"], TEMPLATES["think_prefix"])
    assert tokenizer.shape.header == "<think>\n" and "generation prompt ends" in tokenizer.notes[0]
    (encoded,) = encode_conversations(tokenizer, [Conversation(asked("Paris"), "x:1")])
    assert tokenizer.codec.decode_all(encoded.ids).endswith("assistant\nParis<|im_end|>")
    assert encoded.remarks == ("header",) and "generation prompt" in REMARKS["header"]
    prompt = Conversation(asked("Paris")[:1], "x:1")
    assert encode_prompt(tokenizer, prompt) == encoded.prompt_ids
    # One that does render thinking keeps its prompt: answers with thinking begin so.
    template = TEMPLATES["think_prefix"].replace(
        "m['content']", "('<think>\n' + m.reasoning_content + '</think>' if m.reasoning_content "
        "else '') + m['content']")
    tokenizer = load_tokenizer(folders["qwen"], template)
    assert tokenizer.shape.header == ""
    messages = asked("Paris")
    messages[-1]["reasoning_content"] = "well"
    (encoded,) = encode_conversations(tokenizer, [Conversation(messages, "x:1")])
    assert not encoded.remarks and encode_prompt(tokenizer, prompt) == encoded.prompt_ids
    assert tokenizer.decode(encoded.response_ids) == "well</think>Paris"


@pytest.mark.parametrize(("template", "note"), [
    ("no_generation_prompt", "writes '<|im_start|>assistant"),
    ("empty_think", "writes '<think>"), ("no_end", "no token of its own"), ("chatml", None),
    ("no_think", None), ("trim", None), ("qwen25", None),
])
def test_what_the_user_should_know_of_a_template_is_said(folders, template, note):
    notes = load_tokenizer(folders["qwen"], TEMPLATES[template]).notes
    assert (note is None and notes == ()) or (len(notes) == 1 and note in notes[0])


@pytest.mark.parametrize(("template", "answer"), [
    ("lower", "PARIS"), ("{% for m in messages %}{{ m.content.split('</think>')[-1] + eos_token }}"
                         "{% endfor %}", "<think>a</think>b"),
    ("{% for m in messages %}{{ m.content[:4] + eos_token }}{% endfor %}", "Paris is"),
    ("{% for m in messages %}{{ m.content | replace('a', 'b') + eos_token }}{% endfor %}", "Paris"),
])
def test_an_answer_that_the_template_changes_is_counted(folders, template, answer):
    tokenizer = load_tokenizer(folders["qwen"], TEMPLATES.get(template, template))
    (encoded,) = encode_conversations(tokenizer, [Conversation(asked(answer), "x:1")])
    assert encoded.remarks == ("altered",)


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ loop.length ~ m.content + eos_token }}{% endfor %}",
    "{% for m in messages | reverse %}{{ m.content + eos_token }}{% endfor %}",
    "{{ messages[-1].content + eos_token }}",
])
def test_what_changes_before_the_answer_is_refused_with_the_difference(folders, template):
    tokenizer = load_tokenizer(folders["qwen"], template)
    (error,) = encode_conversations(tokenizer, [Conversation(asked("Rome"), "x:1")])
    assert isinstance(error, RecordError) and " becomes " in str(error)


def test_a_turn_that_begins_with_its_end_is_refused(folders):
    template = ("{% for m in messages %}"
                "{{ '<|im_end|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}")
    with pytest.raises(UserError, match="the token that also ends it"):
        load_tokenizer(folders["qwen"], template)


def test_bos_is_there_once(folders):
    for name in ("llama2", "tekken", "llama3"):
        tokenizer = load_tokenizer(folders[name], TEMPLATES["mistral"])
        bos = tokenizer.bos_id
        (encoded,) = encode_conversations(tokenizer, [Conversation(asked("Rome"), "x:1")])
        plain = Conversation([turn("user", "Q:"), turn("assistant", " A")], "x:1", plain=True)
        spelt = Conversation([turn("user", tokenizer.codec.decode_all([bos]) + "Q:"),
                              turn("assistant", " A")], "x:1", plain=True)
        found = [encoded, *encode_conversations(tokenizer, [plain, spelt])]
        assert [e.ids.count(bos) for e in found] == [1, 1, 1]
        assert all(e.ids[0] == bos and e.prompt_ids[0] == bos for e in found)
