"""Llama 1 to 3 and what borrows its class (SmolLM, TinyLlama, Vicuna and others)."""

from typing import Any

from megatron_irl.families.architecture import Architecture, Family
from megatron_irl.families.config_values import flag, optional_size, size
from megatron_irl.families.llama_like import LLAMA_ROWS, default_head_dim, llama_like
from megatron_irl.families.windows import no_window

NAME = "LlamaForCausalLM"


def _read(hf_config: dict[str, Any]) -> Architecture:
    groups = optional_size(
        hf_config, "num_key_value_heads", size(hf_config, "num_attention_heads")
    )
    head_dim = optional_size(hf_config, "head_dim", default_head_dim(hf_config, groups))
    return llama_like(
        hf_config, NAME, groups=groups, head_dim=head_dim, windows=no_window(hf_config, NAME),
        add_qkv_bias=flag(hf_config, "attention_bias"),
        proj_bias=flag(hf_config, "attention_bias"),
        mlp_bias=flag(hf_config, "mlp_bias"),
    )


LLAMA = Family(NAME, "llama", _read, LLAMA_ROWS)
