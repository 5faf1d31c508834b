"""Mixtral: Mistral with experts."""

from typing import Any

from megatron_irl.families.architecture import Architecture, Family
from megatron_irl.families.config_values import refuse
from megatron_irl.families.mistral import mistral_attention
from megatron_irl.families.moe_like import moe_fields, moe_rows

NAME = "MixtralForCausalLM"


def _read(hf_config: dict[str, Any]) -> Architecture:
    refuse(hf_config, "router_jitter_noise")
    return mistral_attention(
        {"sliding_window": None} | hf_config, NAME,
        **moe_fields(
            hf_config, count="num_local_experts", width="intermediate_size", normalized=True
        ),
    )


MIXTRAL = Family(
    NAME, "mixtral", _read, moe_rows("block_sparse_moe", gate="w1", up="w3", down="w2")
)
