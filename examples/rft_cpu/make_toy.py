"""Make the example's model and data: a small random Llama, its tokenizer, and a task to learn.

    python examples/rft_cpu/make_toy.py --out data/rft_cpu

The task is to reverse a word of three to five letters. Files, all JSONL:

    train.jsonl         demonstrations
    eval.jsonl          held-out demonstrations of other words
    preferences.jsonl   held-out words; chosen is right, rejected has two letters in the wrong place
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefgh"
SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<user>' + m['content'] }}"
    "{% else %}{{ '<assistant>' + m['content'] + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_model(folder: Path, seed: int) -> None:
    """A random Llama of 0.4M parameters and a tokenizer of a token per letter."""
    ids = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>",
        additional_special_tokens=SPECIAL[2:],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(ids), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=ids["<end>"],
        pad_token_id=ids["<pad>"], initializer_range=0.05,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_words(count: int, rng: random.Random) -> list[str]:
    """Distinct words."""
    words: set[str] = set()
    while len(words) < count:
        words.add("".join(rng.choices(LETTERS, k=rng.randint(3, 5))))
    return rng.sample(sorted(words), count)


def demonstration(word: str) -> dict[str, object]:
    right = word[::-1]
    turns = [{"role": "user", "content": word}, {"role": "assistant", "content": right}]
    return {"messages": turns, "answer": right}


def preference(word: str, rng: random.Random) -> dict[str, object]:
    right = list(word[::-1])
    wrong = right
    while wrong == right:
        i, j = rng.sample(range(len(right)), 2)
        wrong = list(right)
        wrong[i], wrong[j] = right[j], right[i]
    prompt = [{"role": "user", "content": word}]
    return {"prompt": prompt, "chosen": "".join(right), "rejected": "".join(wrong)}


def write(path: Path, records: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--heldout", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    make_model(options.out / "model", options.seed)
    words = make_words(options.train + 2 * options.heldout, rng)
    heldout = words[options.train :]
    write(options.out / "train.jsonl", map(demonstration, words[: options.train]))
    write(options.out / "eval.jsonl", map(demonstration, heldout[: options.heldout]))
    mixed = [word for word in heldout[options.heldout :] if len(set(word)) > 1]
    write(options.out / "preferences.jsonl", (preference(word, rng) for word in mixed))


if __name__ == "__main__":
    main()
