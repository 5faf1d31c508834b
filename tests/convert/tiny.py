"""Tiny random Hugging Face models with a working tokenizer, made offline in a second."""

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_llama(
    path: Path,
    *,
    tied: bool = False,
    heads: int = 8,
    kv_heads: int = 4,
    vocab: int = 128,
    layers: int = 4,
    hidden: int = 64,
    intermediate: int = 128,
    seed: int = 0,
    family: str = "llama",
    scale: float = 0.3,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Save a random model and tokenizer; ``config`` goes to the HF config as it is."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    if family != "gpt_neox":
        config["num_key_value_heads"] = kv_heads
    hf_config = AutoConfig.for_model(
        family, vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=256, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=1,
        pad_token_id=1, **config,
    )
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    middle = 0 if family.startswith("gemma") else 1  # Gemma's norms multiply by 1 + weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(middle + 0.2 * torch.randn_like(parameter))
            else:  # large enough that the distribution is not flat
                parameter.copy_(scale * torch.randn_like(parameter) / hidden**0.25)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(path, vocab)
    return path


def make_tokenizer(path: Path, vocab: int = 128, template: str | None = TEMPLATE) -> None:
    """A byte-level tokenizer of at most ``vocab`` ids: printable ASCII and the chat marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<|im_end|>", "<|im_start|>"]
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    ids = {token: i for i, token in enumerate(special + characters)}
    ids = {token: i for token, i in ids.items() if i < vocab}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = template
    fast.save_pretrained(path)
