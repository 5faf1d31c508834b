"""Qwen 3 with experts: attention as in the dense model, every MLP a mixture."""

from typing import Any

from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture, Family
from megatron_irl.families.config_values import flag, refuse
from megatron_irl.families.moe_like import moe_fields, moe_rows
from megatron_irl.families.qwen3 import qwen3_attention

NAME = "Qwen3MoeForCausalLM"


def _read(hf_config: dict[str, Any]) -> Architecture:
    refuse(hf_config, "mlp_only_layers")
    if (step := hf_config.get("decoder_sparse_step", 1)) != 1:
        raise UserError(
            f"config.json: decoder_sparse_step={step} is not supported; every layer must have "
            "experts (1)."
        )
    # Files of before transformers 5.10 say num_experts, newer ones num_local_experts too.
    count = "num_experts" if "num_experts" in hf_config else "num_local_experts"
    return qwen3_attention(
        hf_config, NAME,
        **moe_fields(
            hf_config, count=count, width="moe_intermediate_size",
            normalized=flag(hf_config, "norm_topk_prob"),
        ),
    )


QWEN3_MOE = Family(
    NAME, "qwen3_moe", _read,
    moe_rows("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
)
