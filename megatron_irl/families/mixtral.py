"""Mixtral: Mistral with experts."""

from typing import Any

from megatron_irl.families.architecture import Architecture, Family
from megatron_irl.families.config_values import optional_size, refuse, required_size, size
from megatron_irl.families.llama_like import default_head_dim, llama_like
from megatron_irl.families.moe_like import moe_fields, moe_rows
from megatron_irl.families.windows import window_everywhere

NAME = "MixtralForCausalLM"


def _read(hf_config: dict[str, Any]) -> Architecture:
    refuse(hf_config, "attention_bias", "mlp_bias", "router_jitter_noise")
    heads = size(hf_config, "num_attention_heads")
    groups = required_size(hf_config, "num_key_value_heads", heads, NAME)
    head_dim = optional_size(hf_config, "head_dim", default_head_dim(hf_config, groups))
    return llama_like(
        hf_config, NAME, groups=groups, head_dim=head_dim,
        windows=window_everywhere({"sliding_window": None} | hf_config),
        **moe_fields(
            hf_config, count="num_local_experts", width="intermediate_size", normalized=True
        ),
    )


MIXTRAL = Family(
    NAME, "mixtral", _read, moe_rows("block_sparse_moe", gate="w1", up="w3", down="w2")
)
