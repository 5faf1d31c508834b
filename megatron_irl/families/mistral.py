"""Mistral 7B and its descendants (Zephyr among them): Llama with a window in every layer."""

from typing import Any

from megatron_irl.families.architecture import Architecture, Family
from megatron_irl.families.config_values import optional_size, refuse, required_size, size
from megatron_irl.families.llama_like import LLAMA_ROWS, default_head_dim, llama_like
from megatron_irl.families.windows import window_everywhere

NAME = "MistralForCausalLM"


def _read(hf_config: dict[str, Any]) -> Architecture:
    refuse(hf_config, "attention_bias", "mlp_bias")
    heads = size(hf_config, "num_attention_heads")
    groups = required_size(hf_config, "num_key_value_heads", heads, NAME)
    head_dim = optional_size(hf_config, "head_dim", default_head_dim(hf_config, groups))
    return llama_like(
        hf_config, NAME, groups=groups, head_dim=head_dim, windows=window_everywhere(hf_config)
    )


MISTRAL = Family(NAME, "mistral", _read, LLAMA_ROWS)
