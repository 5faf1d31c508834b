"""Small tokenizers built on the spot: in ``byte_folder`` the id of a character is its byte."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron_irl.data.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM_START, IM_END, BOS, END_OF_TEXT = 256, 257, 258, 259


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's spelling of each byte: printable Latin-1 as itself, the rest above 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@pytest.fixture
def byte_folder(tmp_path):
    """Make a HF folder: 256 byte tokens, then <|im_start|>, <|im_end|>, <|bos|>, <|eot|>."""

    def build(chat_template: str | None = CHATML, adds_bos: bool = False, **config):
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        specials = ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|eot|>"]
        tokenizer.add_special_tokens([AddedToken(t, special=True) for t in specials])
        if adds_bos:
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>",
                  "eos_token": "<|im_end|>"} | config
        if chat_template is not None:
            config["chat_template"] = chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return build


@pytest.fixture
def byte_tokenizer(byte_folder):
    return load_tokenizer(byte_folder())


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    words = [f"{a} plus {b} is {a + b}" for a in range(20) for b in range(20)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=40, model_type="bpe",
        minloglevel=2, num_threads=1)
    return model.getvalue()
