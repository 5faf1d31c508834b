"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and windows where asked for."""

from typing import Any

from megatron_irl.families.architecture import Architecture, Family
from megatron_irl.families.config_values import optional_size, refuse, required_size, size
from megatron_irl.families.llama_like import LLAMA_ROWS, default_head_dim, llama_like
from megatron_irl.families.windows import window_in_some_layers

NAME = "Qwen2ForCausalLM"


def _read(hf_config: dict[str, Any]) -> Architecture:
    refuse(hf_config, "attention_bias", "mlp_bias")  # its biases are in no config key
    heads = size(hf_config, "num_attention_heads")
    groups = required_size(hf_config, "num_key_value_heads", heads, NAME)
    head_dim = optional_size(hf_config, "head_dim", default_head_dim(hf_config, groups))
    return llama_like(
        hf_config, NAME, groups=groups, head_dim=head_dim,
        windows=window_in_some_layers(hf_config), add_qkv_bias=True,
    )


QWEN2 = Family(NAME, "qwen2", _read, LLAMA_ROWS)
