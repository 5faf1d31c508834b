"""One door for text: prompt and response are parts of the whole rendered conversation's ids."""

import pytest
from transformers import AutoTokenizer

from megatron_irl.data.conversation import Conversation
from megatron_irl.data.readers import RecordError
from megatron_irl.data.rendering import encode_conversations, encode_prompt
from megatron_irl.data.tokenizer import load_tokenizer
from tests.unit.data.shapes import TEMPLATES, TOKENIZERS, write_tokenizer


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
