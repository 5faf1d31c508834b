"""Qwen 3 (dense): Llama with normalised queries and keys, heads of their own size."""

from typing import Any

from megatron_irl.families.architecture import Architecture, Family
from megatron_irl.families.config_values import flag, refuse, required_size, size
from megatron_irl.families.llama_like import LLAMA_ROWS, default_head_dim, llama_like
from megatron_irl.families.windows import window_in_some_layers

NAME = "Qwen3ForCausalLM"


def _read(hf_config: dict[str, Any]) -> Architecture:
    return qwen3_attention(hf_config, NAME)


def qwen3_attention(hf_config: dict[str, Any], family: str, **options: Any) -> Architecture:
    """An architecture with this attention; ``options`` as of ``llama_like``."""
    refuse(hf_config, "mlp_bias")
    heads = size(hf_config, "num_attention_heads")
    groups = required_size(hf_config, "num_key_value_heads", heads, family)
    head_dim = required_size(hf_config, "head_dim", default_head_dim(hf_config, groups), family)
    return llama_like(
        hf_config, family, groups=groups, head_dim=head_dim,
        windows=window_in_some_layers(hf_config), qk_layernorm=True,
        add_qkv_bias=flag(hf_config, "attention_bias"),
        proj_bias=flag(hf_config, "attention_bias"), **options,
    )


QWEN3 = Family(NAME, "qwen3", _read, LLAMA_ROWS)
