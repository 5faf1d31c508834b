"""Mistral 7B and its descendants (Zephyr among them): Llama with a window in every layer."""

from typing import Any

from megatron_irl.families.architecture import Architecture, Family
from megatron_irl.families.config_values import optional_size, refuse, required_size, size
from megatron_irl.families.llama_like import LLAMA_ROWS, default_head_dim, llama_like
from megatron_irl.families.windows import window_everywhere

NAME = "MistralForCausalLM"


def _read(hf_config: dict[str, Any]) -> Architecture:
    return mistral_attention(hf_config, NAME)


def mistral_attention(hf_config: dict[str, Any], family: str, **options: Any) -> Architecture:
    """An architecture with this attention; ``options`` as of ``llama_like``."""
    refuse(hf_config, "attention_bias", "mlp_bias")
    heads = size(hf_config, "num_attention_heads")
    groups = required_size(hf_config, "num_key_value_heads", heads, family)
    head_dim = optional_size(hf_config, "head_dim", default_head_dim(hf_config, groups))
    return llama_like(
        hf_config, family, groups=groups, head_dim=head_dim,
        windows=window_everywhere(hf_config), **options,
    )


MISTRAL = Family(NAME, "mistral", _read, LLAMA_ROWS)
