"""Phi 3 and 4: Llama with fused projections in the files, and RoPE over a part of the head."""

from typing import Any

from megatron_irl.families.architecture import Architecture, Family
from megatron_irl.families.config_values import number, optional_size, refuse, size
from megatron_irl.families.llama_like import LLAMA_ROWS, default_head_dim, llama_like
from megatron_irl.families.rope import LONGROPE, ORIGINAL, rope_settings
from megatron_irl.families.rows import LAYER, Row, hf
from megatron_irl.families.tensors import FusedGateUp, FusedQkv
from megatron_irl.families.windows import window_everywhere

NAME = "Phi3ForCausalLM"
DEFAULT_ORIGINAL = 4096  # of transformers' config class, which goes before what rope_scaling says
_L = "model.layers.{}."

_FUSED = {
    LAYER + "self_attention.linear_qkv.weight": Row(
        LAYER + "self_attention.linear_qkv.weight", FusedQkv(),
        (hf(_L + "self_attn.qkv_proj.weight", "qkv", "hidden"),),
    ),
    LAYER + "mlp.linear_fc1.weight": Row(
        LAYER + "mlp.linear_fc1.weight", FusedGateUp(),
        (hf(_L + "mlp.gate_up_proj.weight", "gate_up", "hidden"),),
    ),
}
ROWS = tuple(_FUSED.get(row.megatron, row) for row in LLAMA_ROWS)


def _read(hf_config: dict[str, Any]) -> Architecture:
    refuse(hf_config, "attention_bias", "mlp_bias")
    heads = size(hf_config, "num_attention_heads")
    groups = optional_size(hf_config, "num_key_value_heads", heads)
    head_dim = optional_size(hf_config, "head_dim", default_head_dim(hf_config, groups))
    rope = rope_settings(
        {ORIGINAL: DEFAULT_ORIGINAL} | hf_config, types=("default", LONGROPE)
    )
    longest = size(hf_config, "max_position_embeddings")
    if rope["rope_type"] == LONGROPE:
        # Beyond the original length every frequency changes, also of the tokens before: one
        # sequence would need two tables, and a paged cache would hold keys of both kinds. Up to
        # there the short factors hold, so that is as long as a sequence may be.
        longest = min(longest, int(number(rope, ORIGINAL)))
    return llama_like(
        hf_config, NAME, groups=groups, head_dim=head_dim, rope=rope,
        windows=window_everywhere({"sliding_window": None} | hf_config),
        max_sequence_length=longest,
    )


PHI3 = Family(NAME, "phi3", _read, ROWS)
