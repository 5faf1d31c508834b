"""What Llama and its descendants share: RMSNorm, gated MLP, grouped queries, RoPE."""

import dataclasses
from typing import Any

from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture, transformer_fields
from megatron_irl.families.config_values import number, size
from megatron_irl.families.rope import inverse_frequencies, rope_scale, rope_settings
from megatron_irl.families.rows import LAYER, REWARD_ROW, Row, embedding_row, head_row, hf
from megatron_irl.families.tensors import GateUp, Qkv, Replicated, Split

_L = "model.layers.{}."

LLAMA_ROWS = (
    embedding_row("model.embed_tokens.weight"),
    Row(LAYER + "input_layernorm.weight", Replicated(),
        (hf(_L + "input_layernorm.weight", "hidden"),)),
    Row(LAYER + "self_attention.linear_qkv.weight", Qkv(),
        (hf(_L + "self_attn.q_proj.weight", "q", "hidden"),
         hf(_L + "self_attn.k_proj.weight", "kv", "hidden"),
         hf(_L + "self_attn.v_proj.weight", "kv", "hidden"))),
    Row(LAYER + "self_attention.linear_qkv.bias", Qkv(),
        (hf(_L + "self_attn.q_proj.bias", "q"),
         hf(_L + "self_attn.k_proj.bias", "kv"),
         hf(_L + "self_attn.v_proj.bias", "kv")), when="add_qkv_bias"),
    Row(LAYER + "self_attention.q_layernorm.weight", Replicated(),
        (hf(_L + "self_attn.q_norm.weight", "head"),), when="qk_layernorm"),
    Row(LAYER + "self_attention.k_layernorm.weight", Replicated(),
        (hf(_L + "self_attn.k_norm.weight", "head"),), when="qk_layernorm"),
    Row(LAYER + "self_attention.linear_proj.weight", Split(1),
        (hf(_L + "self_attn.o_proj.weight", "hidden", "q"),)),
    Row(LAYER + "self_attention.linear_proj.bias", Replicated(),
        (hf(_L + "self_attn.o_proj.bias", "hidden"),), when="proj_bias"),
    Row(LAYER + "pre_mlp_layernorm.weight", Replicated(),
        (hf(_L + "post_attention_layernorm.weight", "hidden"),)),
    Row(LAYER + "mlp.linear_fc1.weight", GateUp(),
        (hf(_L + "mlp.gate_proj.weight", "ffn", "hidden"),
         hf(_L + "mlp.up_proj.weight", "ffn", "hidden"))),
    Row(LAYER + "mlp.linear_fc1.bias", GateUp(),
        (hf(_L + "mlp.gate_proj.bias", "ffn"), hf(_L + "mlp.up_proj.bias", "ffn")),
        when="mlp_bias"),
    Row(LAYER + "mlp.linear_fc2.weight", Split(1),
        (hf(_L + "mlp.down_proj.weight", "hidden", "ffn"),)),
    Row(LAYER + "mlp.linear_fc2.bias", Replicated(), (hf(_L + "mlp.down_proj.bias", "hidden"),),
        when="mlp_bias"),
    Row("decoder.final_layernorm.weight", Replicated(), (hf("model.norm.weight", "hidden"),)),
    head_row("lm_head.weight"),
    REWARD_ROW,
)


def llama_like(
    hf_config: dict[str, Any], family: str, *, groups: int, head_dim: int,
    windows: dict[str, Any], rope: dict[str, Any] | None = None, **options: Any,
) -> Architecture:
    """The architecture of a family of this kind.

    Args:
        hf_config: The whole config.json.
        family: Its HF class name.
        groups, head_dim: Key heads, and the size of a head.
        windows: TransformerConfig fields of its sliding windows.
        rope: What ``rope_settings`` gave, where the family reads it in its own way.
        options: Further fields, of TransformerConfig or of the Architecture, by name.

    Raises:
        UserError: An option in use that is not implemented, by its key.
    """
    activation = hf_config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"config.json: hidden_act {activation} is not supported (silu is).")
    if rope is None:
        rope = rope_settings(hf_config)
        if rope["partial_rotary_factor"] != 1:
            raise UserError("config.json: partial_rotary_factor other than 1 is not supported.")
    own = {f.name for f in dataclasses.fields(Architecture)} & set(options)
    fields = {
        "normalization": "RMSNorm", "layernorm_epsilon": number(hf_config, "rms_norm_eps"),
        "gated_linear_unit": True, "activation_func": activation, "add_bias_linear": False,
        "add_qkv_bias": False, "qk_layernorm": False,
    } | {name: value for name, value in options.items() if name not in own}
    shape: dict[str, Any] = {name: options[name] for name in own}
    shape.setdefault("max_sequence_length", size(hf_config, "max_position_embeddings"))
    return Architecture(
        family=family,
        transformer=transformer_fields(
            hf_config, groups=groups, head_dim=head_dim, **fields, **windows
        ),
        vocab_size=size(hf_config, "vocab_size"),
        rotary_base=number(rope, "rope_theta"),
        rotary_percent=rope["partial_rotary_factor"],
        inv_freq=inverse_frequencies(rope, head_dim),
        rope_scale=rope_scale(rope),
        tie_word_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
        **shape,
    )


def default_head_dim(hf_config: dict[str, Any], groups: int) -> int:
    """The size of a head where the config states none; checks the number of heads.

    Raises:
        UserError: The heads are no multiple of the key heads, or do not divide the hidden size.
    """
    hidden, heads = size(hf_config, "hidden_size"), size(hf_config, "num_attention_heads")
    if heads % groups or (hf_config.get("head_dim") is None and hidden % heads):
        raise UserError(
            f"config.json: num_attention_heads={heads} conflicts with num_key_value_heads={groups} "
            f"or hidden_size={hidden}; it must be a multiple of the former and divide the latter."
        )
    return hidden // heads
