"""Tokenizers and chat templates with the structure of public ones, in words of our own.

Tokenizers differ in where a word's space goes: SentencePiece ones ("▁" put before the text, before
every stretch between special tokens, or before the first only) and byte-level ones, with the
splitting rules of different families.
"""

import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo", "Peru": "Lima"}


def corpus() -> Iterator[str]:
    for country, city in CITIES.items():
        yield f"What is the capital of {country}? {city} is the capital of {country}."
        yield f"{city} is the capital.\n{city}, 42 and {len(country)} more: yes, no?\n\nsystem user"
        yield "assistant user system You are brief. Answer: Question: <|user|> [INST] think"


@functools.cache
def _spaced_vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Pieces and merges with "▁" for a space, as SentencePiece's BPE has them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=320, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [piece for piece in model["vocab"] if piece not in names]
    vocab = {piece: i for i, piece in enumerate([*names, *pieces])}
    return vocab, tuple(map(tuple, model["merges"]))


def spaced(scheme: str) -> Tokenizer:
    """A SentencePiece kind of tokenizer; ``scheme``: legacy, always, first or never."""
    vocab, merges = _spaced_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), unk_token="<unk>",
                                     fuse_unk=True, byte_fallback=True))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme != "never":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False)
                                  for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return tokenizer


DIGITS = {"llama3": r"\p{N}{1,3}", "qwen": r"\p{N}", "tekken": r"\p{N}"}


def byte_level(kind: str, specials: list[str], bos: str | None = None) -> Tokenizer:
    """A byte-level tokenizer; ``kind``: llama3, qwen, tekken, or gpt2 with a space put before."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        words = r"[^\r\n\p{L}\p{N}]?\p{L}+|" + DIGITS[kind]
        rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(words + rest), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=420, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    elif kind == "gpt2":  # takes the space out of the offsets
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


# name -> (tokenizer, special tokens of its configuration)
TOKENIZERS: dict[str, Any] = {
    "llama2": (lambda: spaced("legacy"), {"bos_token": "<s>", "eos_token": "</s>"}),
    "mistral01": (lambda: spaced("always"), {"bos_token": "<s>", "eos_token": "</s>"}),
    "zephyr": (lambda: spaced("legacy"), {"bos_token": "<s>", "eos_token": "</s>"}),
    "tinyllama": (lambda: spaced("first"), {"bos_token": "<s>", "eos_token": "</s>"}),
    "gemma": (lambda: spaced("never"), {"bos_token": "<s>", "eos_token": "</s>"}),
    "llama3": (
        lambda: byte_level("llama3", ["<|begin|>", "<|finish|>", "<|head|>", "<|/head|>", "<|eot|>",
                                      "<|im_start|>", "<|im_end|>"], "<|begin|>"),
        {"bos_token": "<|begin|>", "eos_token": "<|finish|>"}),
    "tekken": (
        lambda: byte_level("tekken", ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>"),
        {"bos_token": "<s>", "eos_token": "</s>"}),
    "qwen": (
        lambda: byte_level("qwen", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "chatml": (
        lambda: byte_level("gpt2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>",
                                    "<|user|>", "<|assistant|>", "<|system|>"]),
        {"eos_token": "<|endoftext|>"}),
}

PLAIN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set first = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}{% else %}{% set first = '' %}"
    "{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}"
    "{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + "
    "(first if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('only user and assistant, in turn') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}")
TEKKEN = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}{{ '[INST]' + (ns.system if loop.last else '') + m.content + "
    "'[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}")
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + "
    "m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}")
QWEN25 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are brief.<|im_end|>\n' }}"
    "{% endif %}" + PLAIN_CHATML)
QWEN3 = (
    "{% set ns = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.asked %}"
    "{{ '<think>\n' + (m.reasoning_content or '') | trim + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' "
    "else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
FOOT = ("{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' + TAIL }}{% endif %}")
EMPTY_THINK = "'<think>\n\n</think>\n\n'"
OF_ASSISTANT = f"({EMPTY_THINK} if m['role'] == 'assistant' else '') + "


def chatml(content: str = "m['content']", end: str = "<|im_end|>", tail: str = "''",
           generation_prompt: bool = True) -> str:
    """ChatML with one thing changed."""
    foot = FOOT.replace("TAIL", tail) if generation_prompt else "{% endfor %}"
    return HEAD + content + f" + '{end}\n' }}}}" + foot


TEMPLATES = {
    "llama2": LLAMA2, "mistral": MISTRAL, "tekken": TEKKEN, "zephyr": ZEPHYR, "llama3": LLAMA3,
    "qwen25": QWEN25, "qwen3": QWEN3, "gemma": GEMMA, "phi": PHI, "vicuna": VICUNA,
    "chatml": PLAIN_CHATML,
    "lower": chatml("m['content'] | lower"),
    "trim": chatml("m['content'] | trim"),
    "no_generation_prompt": chatml(generation_prompt=False),
    "think_prefix": chatml(tail="'<think>\n'"),
    "no_think": chatml(OF_ASSISTANT + "m['content']", tail=EMPTY_THINK),
    "empty_think": chatml(OF_ASSISTANT + "m['content']"),
    "turn_end_not_eos": chatml(end="<|im_start|>"),
    "no_end": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
    "space_end": "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}  # fmt: skip


def write_tokenizer(folder: Path, name: str, template: str | None) -> Path:
    """Write the folder of a tokenizer of ``TOKENIZERS``."""
    build, config = TOKENIZERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def sentencepiece_model() -> bytes:
    """A SentencePiece model file, whose library puts a space before every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([t for text in corpus() for t in text.split("\n") if t]),
        model_writer=model, vocab_size=360, model_type="bpe", byte_fallback=True, minloglevel=2,
        num_threads=1, normalization_rule_name="identity", remove_extra_whitespaces=False)
    return model.getvalue()
