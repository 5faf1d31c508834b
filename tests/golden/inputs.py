"""Tiny models and demonstrations for recorded runs, the same on every machine.

Weights are uniform numbers of a generator whose stream numpy has frozen, so that a record made on
one machine says something on another. Demonstrations are such that the chat rendered as a whole
has the ids of prompt and response apart: every response begins with a letter, and neither begins
nor ends with a blank.
"""

import json
import zlib
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_end|>", "<|im_start|>")
PAD, EOS = 0, 1
# Pairs that are one token; Ġ and Ċ are the byte-level alphabet's blank and newline.
MERGES = ("th", "an", "in", "er", "ou", "he", "Ġa", "Ġs", "ar", "st", "Ġb", "es", "ow", "ng", "ee",
          "us", "as", "Ġt", "Ġi", "om", "en", "is", "re", "Ġw", "ss", "ll", "ha", "at", "or")
VOCABULARY = 128

_PLACES = ("a pond", "the barn", "an old mill", "the river", "a hill", "the town")
_ANIMALS = ("heron", "mouse", "owl", "otter", "goat", "sparrow")
_DOINGS = ("waits", "runs off", "sits and sings", "is asleep", "swims", "hides in the straw")


def write_inputs(folder: Path) -> Path:
    """Write ``llama/``, ``neox/`` and the data files of the recorded runs; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "llama", "llama")
    write_model(folder / "neox", "gpt_neox")
    write_data(folder)
    return folder


def write_model(folder: Path, family: str, *, tied: bool = False) -> None:
    """Save a two-layer model of random weights, and its tokenizer, as a Hugging Face folder."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"num_key_value_heads": 2} if family == "llama" else {}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, **options,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = np.random.RandomState(zlib.crc32(name.encode()))
            values = draw.random_sample(tuple(parameter.shape)) - 0.5
            is_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.from_numpy(1 + 0.4 * values if is_scale else 0.5 * values))
        # One direction is the same in every hidden state, and the end token reads it: some samples
        # are to end by themselves within their few tokens.
        model.get_input_embeddings().weight[:, 0] = 1.0
        if not tied:
            model.get_output_embeddings().weight[:, 0] = 0.0
        model.get_output_embeddings().weight[EOS, 0] = 1.5
    model.save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of ASCII with a few merges, and a chat template of marked turns."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = [*SPECIAL, *characters, *MERGES]
    ids = {token: i for i, token in enumerate(tokens)}
    assert len(ids) == VOCABULARY
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[(m[0], m[1]) for m in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[EOS], pad_token=SPECIAL[PAD],
        additional_special_tokens=[SPECIAL[2]], clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_data(folder: Path) -> None:
    """``train.jsonl`` (14 demonstrations), ``eval.jsonl`` (3) and ``preferences.jsonl`` (5)."""
    _write(folder / "train.jsonl", [demonstration(i) for i in range(14)])
    _write(folder / "eval.jsonl", [demonstration(i) | {"answer": "a"} for i in range(20, 23)])
    _write(folder / "preferences.jsonl", [preference(i) for i in range(30, 35)])


def demonstration(index: int) -> dict[str, Any]:
    """Question and answer number ``index``; some have a system turn or an earlier exchange."""
    animal, place = _ANIMALS[index % 6], _PLACES[index * 5 // 6 % 6]
    turns = [{"role": "user", "content": f"Who is by {place}?"}]
    if index % 3 == 0:
        turns.insert(0, {"role": "system", "content": "Be short."})
    if index % 4 == 1:
        earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
        turns = earlier + turns
    answer = f"The {animal} {_DOINGS[index * 7 // 4 % 6]}."[: 8 + index % 9 * 2].rstrip()
    return {"messages": [*turns, {"role": "assistant", "content": answer}]}


def preference(index: int) -> dict[str, Any]:
    """A prompt with a better and a worse answer."""
    *prompt, answer = demonstration(index)["messages"]
    return {"prompt": prompt, "chosen": answer["content"], "rejected": "No" + "o" * (index % 4)}


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
