"""Exact ids: what generation sees is what training sees."""

import json

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_irl.data.conversation import Conversation
from megatron_irl.data.readers import RecordError
from megatron_irl.data.rendering import encode_conversations, encode_prompt
from megatron_irl.data.tokenizer import load_tokenizer
from megatron_irl.errors import UserError

IM_START, IM_END, BOS, END_OF_TEXT = 256, 257, 258, 259
ASK = [{"role": "user", "content": "2+2?"}]
ASK_IDS = [IM_START, *b"user\n2+2?", IM_END, *b"\n", IM_START, *b"assistant\n"]


def prompt_ids(tokenizer, prompt):
    plain = isinstance(prompt, str)
    messages = [{"role": "user", "content": prompt}] if plain else prompt
    return encode_prompt(tokenizer, Conversation(messages, "", plain=plain))


def encoded(tokenizer, prompt, response):
    """What a prompt and its response become; raises what is wrong with them."""
    plain = isinstance(prompt, str)
    messages = [{"role": "user", "content": prompt}] if plain else prompt
    answer = {"role": "assistant", "content": response}
    (found,) = encode_conversations(
        tokenizer, [Conversation([*messages, answer], "", plain=plain)], allow_empty=True)
    if isinstance(found, RecordError):
        raise found
    return found


def response_ids(tokenizer, text, prompt="Q"):
    return encoded(tokenizer, prompt, text).response_ids


def test_chatml_prompt_and_response_ids(byte_tokenizer):
    assert prompt_ids(byte_tokenizer, ASK) == ASK_IDS
    found = encoded(byte_tokenizer, ASK, "4")
    assert (found.prompt_ids, found.response_ids) == (ASK_IDS, [*b"4", IM_END])
    assert response_ids(byte_tokenizer, "4") == [*b"4", IM_END]
    assert byte_tokenizer.vocab_size == 260
    assert byte_tokenizer.stop_ids == (IM_END,)


def test_prompt_ids_equal_the_hf_ones(byte_folder):
    folder = byte_folder()
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        ASK, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(load_tokenizer(folder), ASK) == expected


def test_nothing_is_stripped(byte_tokenizer):
    text = "  two  spaces \n\n"
    assert response_ids(byte_tokenizer, text) == [*text.encode(), IM_END]
    assert response_ids(byte_tokenizer, text, ASK) == [*text.encode(), IM_END]
    assert byte_tokenizer.decode(response_ids(byte_tokenizer, text)) == text
    assert prompt_ids(byte_tokenizer, " Q:\n") == [*b" Q:\n"]


@pytest.mark.parametrize("prompt", ["Q", ASK])
def test_one_eos_even_if_the_text_brings_its_own(byte_tokenizer, prompt):
    assert response_ids(byte_tokenizer, "4<|im_end|>", prompt) == [*b"4", IM_END]
    assert response_ids(byte_tokenizer, "", prompt) == [IM_END]
    with pytest.raises(RecordError, match="end-of-response token inside"):
        response_ids(byte_tokenizer, "4<|im_end|>\nmore", prompt)


def test_pad_falls_back_to_eos(byte_folder, byte_tokenizer):
    assert byte_tokenizer.pad_id == byte_tokenizer.eos_id == IM_END


def test_pad_of_its_own(byte_folder):
    assert load_tokenizer(byte_folder(pad_token="<|eot|>")).pad_id == END_OF_TEXT


def test_string_prompt_gets_the_default_bos_once(byte_folder):
    tokenizer = load_tokenizer(byte_folder(adds_bos=True))
    assert prompt_ids(tokenizer, "Q") == [BOS, *b"Q"]
    assert prompt_ids(tokenizer, "<|bos|>Q") == [BOS, *b"Q"]
    assert tokenizer.encode("Q") == [*b"Q"]
    assert response_ids(tokenizer, "A") == [*b"A", IM_END]
    assert prompt_ids(tokenizer, ASK) == ASK_IDS  # the template writes BOS where it wants one


def test_missing_chat_template(byte_folder):
    tokenizer = load_tokenizer(byte_folder(chat_template=None))
    assert prompt_ids(tokenizer, "Q") == [*b"Q"]
    with pytest.raises(UserError, match=r"Set data\.chat_template"):
        prompt_ids(tokenizer, ASK)


def test_chat_template_from_text_and_file(byte_folder, tmp_path):
    template = "{{ bos_token }}{{ messages[0]['content'] }}:"
    (tmp_path / "my.jinja").write_text(template)
    folder = byte_folder()
    for given in (template, str(tmp_path / "my.jinja")):
        assert prompt_ids(load_tokenizer(folder, given), ASK) == [BOS, *b"2+2?:"]
    with pytest.raises(UserError, match="neither a file nor a Jinja template"):
        load_tokenizer(folder, "no_such.jinja")


def test_template_that_refuses(byte_folder):
    tokenizer = load_tokenizer(byte_folder("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(RecordError, match="refuses the messages: roles must alternate"):
        prompt_ids(tokenizer, ASK)


@pytest.mark.parametrize("listed, stop_ids", [
    (END_OF_TEXT, (IM_END, END_OF_TEXT)),
    ([END_OF_TEXT, IM_END], (IM_END, END_OF_TEXT)),
    (None, (IM_END,)),
])
def test_stop_ids_from_generation_config(byte_folder, listed, stop_ids):
    folder = byte_folder()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_ids == stop_ids
    assert tokenizer.eos_id == IM_END
    if len(stop_ids) > 1:
        with pytest.raises(RecordError):
            response_ids(tokenizer, "4<|eot|>5")


def test_eos_is_the_templates_end_of_turn_when_the_model_stops_there(byte_folder):
    """As Gemma: tokenizer EOS is one token, turns end with another, generation lists both."""
    folder = byte_folder(eos_token="<|eot|>")
    tokenizer = load_tokenizer(folder)  # what the template writes is what samples end with
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (IM_END, (IM_END, END_OF_TEXT))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [END_OF_TEXT, IM_END]}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_ids == (IM_END, END_OF_TEXT)
    assert response_ids(tokenizer, "4") == [*b"4", IM_END]


def test_no_eos_and_no_tokenizer(byte_folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(byte_folder(chat_template=None, eos_token=None))


def test_remote_code_is_never_run(byte_folder, tmp_path):
    folder = byte_folder(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    try:
        load_tokenizer(folder)
    except UserError:
        pass
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("as_folder", [False, True])
def test_sentencepiece(tmp_path, sentencepiece_model, as_folder):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_model)
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    template = "{{ bos_token }}{{ messages[0]['content'] }}</s>"
    tokenizer = load_tokenizer(tmp_path if as_folder else file, template)

    text = "3 plus 4 is"
    ids = reference.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.vocab_size == 40
    assert tokenizer.encode(text) == ids
    assert prompt_ids(tokenizer, text) == [1, *ids]
    assert prompt_ids(tokenizer, [{"role": "user", "content": text}]) == [1, *ids, 2]
    whole = [1, *reference.encode(f"{text}: {text}"), 2]
    for response in (text, text + "</s>"):  # no space before it but the prompt's own
        assert encoded(tokenizer, f"{text}: ", response).ids == whole
    assert tokenizer.decode([1, *ids, 2]) == text


TEXTS = ["3 plus 4 is 7", "", " ", "</s>", "<s>3 plus</s></s> is\n</s>",
         "é\u2028 <|bos|>x<|im_end|>", "3 plus 4 is 7", "  two  spaces \n"]


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_texts_together_give_the_ids_they_give_alone(request, tmp_path, kind):
    if kind == "byte":
        tokenizer = load_tokenizer(request.getfixturevalue("byte_folder")(adds_bos=True))
    else:
        (tmp_path / "tokenizer.model").write_bytes(request.getfixturevalue("sentencepiece_model"))
        tokenizer = load_tokenizer(tmp_path)
    together = tokenizer.encode_batch(TEXTS)
    assert together == [tokenizer.encode(text) for text in TEXTS]
    assert together[0] == together[6] != [] == together[1]
    assert tokenizer.encode_batch([]) == []
    if kind == "sentencepiece":
        reference = sentencepiece.SentencePieceProcessor(
            model_file=str(tmp_path / "tokenizer.model"))
        assert together[4] == [1, *reference.encode("3 plus"), 2, 2, *reference.encode(" is\n"), 2]


def test_sentencepiece_rejects_other_files(tmp_path):
    (tmp_path / "tokenizer.model").write_text("not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
