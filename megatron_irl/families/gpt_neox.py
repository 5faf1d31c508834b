"""GPT-NeoX and Pythia: LayerNorm and biases everywhere, plain MLP, RoPE over a part of the head."""

from typing import Any

from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture, Family, transformer_fields
from megatron_irl.families.config_values import number, size
from megatron_irl.families.rope import inverse_frequencies, rope_settings
from megatron_irl.families.rows import LAYER, REWARD_ROW, Row, embedding_row, head_row, hf
from megatron_irl.families.tensors import Replicated, Split

NAME = "GPTNeoXForCausalLM"
_N = "gpt_neox.layers.{}."

# Its fused query_key_value has Megatron's own layout: per head the query, key and value rows.
ROWS = (
    embedding_row("gpt_neox.embed_in.weight"),
    *(Row(f"{LAYER}input_layernorm.{part}", Replicated(),
          (hf(f"{_N}input_layernorm.{part}", "hidden"),)) for part in ("weight", "bias")),
    Row(LAYER + "self_attention.linear_qkv.weight", Split(0),
        (hf(_N + "attention.query_key_value.weight", "qkv", "hidden"),)),
    Row(LAYER + "self_attention.linear_qkv.bias", Split(0),
        (hf(_N + "attention.query_key_value.bias", "qkv"),)),
    Row(LAYER + "self_attention.linear_proj.weight", Split(1),
        (hf(_N + "attention.dense.weight", "hidden", "q"),)),
    Row(LAYER + "self_attention.linear_proj.bias", Replicated(),
        (hf(_N + "attention.dense.bias", "hidden"),)),
    *(Row(f"{LAYER}pre_mlp_layernorm.{part}", Replicated(),
          (hf(f"{_N}post_attention_layernorm.{part}", "hidden"),)) for part in ("weight", "bias")),
    Row(LAYER + "mlp.linear_fc1.weight", Split(0),
        (hf(_N + "mlp.dense_h_to_4h.weight", "ffn", "hidden"),)),
    Row(LAYER + "mlp.linear_fc1.bias", Split(0), (hf(_N + "mlp.dense_h_to_4h.bias", "ffn"),)),
    Row(LAYER + "mlp.linear_fc2.weight", Split(1),
        (hf(_N + "mlp.dense_4h_to_h.weight", "hidden", "ffn"),)),
    Row(LAYER + "mlp.linear_fc2.bias", Replicated(),
        (hf(_N + "mlp.dense_4h_to_h.bias", "hidden"),)),
    *(Row(f"decoder.final_layernorm.{part}", Replicated(),
          (hf(f"gpt_neox.final_layer_norm.{part}", "hidden"),)) for part in ("weight", "bias")),
    head_row("embed_out.weight"),
    REWARD_ROW,
)

# HF's names → ours; gelu is exact, the others are its tanh approximation.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}


def _read(hf_config: dict[str, Any]) -> Architecture:
    activation = hf_config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"config.json: hidden_act {activation} is not supported; supported are "
            f"{', '.join(ACTIVATIONS)}."
        )
    if hf_config.get("attention_bias") is False:
        raise UserError(
            "config.json: attention_bias=false is not supported; Megatron has biases in all linear "
            "layers or in none."
        )
    hidden, heads = size(hf_config, "hidden_size"), size(hf_config, "num_attention_heads")
    if hidden % heads:
        raise UserError(
            f"config.json: num_attention_heads={heads} conflicts with hidden_size={hidden}; it "
            "must divide it."
        )
    rope = rope_settings(
        hf_config, theta_key="rotary_emb_base", percent_key="rotary_pct", default_percent=0.25
    )
    return Architecture(
        family=NAME,
        transformer=transformer_fields(
            hf_config, groups=heads, head_dim=hidden // heads,
            normalization="LayerNorm",
            layernorm_epsilon=number({"layer_norm_eps": 1e-5} | hf_config, "layer_norm_eps"),
            gated_linear_unit=False,
            activation_func=ACTIVATIONS[activation],
            add_bias_linear=True,
            add_qkv_bias=True,
            qk_layernorm=False,
        ),
        vocab_size=size(hf_config, "vocab_size"),
        max_sequence_length=size(hf_config, "max_position_embeddings"),
        rotary_base=number(rope, "rope_theta"),
        rotary_percent=rope["partial_rotary_factor"],
        inv_freq=inverse_frequencies(rope, hidden // heads),
        tie_word_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
        parallel_residual=bool(hf_config.get("use_parallel_residual", True)),
    )


GPT_NEOX = Family(NAME, "gpt_neox", _read, ROWS)
