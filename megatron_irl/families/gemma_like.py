"""What Gemma 2 and 3 share: four norms by 1 + weight in a layer, scaled embeddings, GeGLU."""

from typing import Any

from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture, transformer_fields
from megatron_irl.families.config_values import flag, number, refuse, required_size, size
from megatron_irl.families.llama_like import LLAMA_ROWS
from megatron_irl.families.rope import inverse_frequencies
from megatron_irl.families.rows import LAYER, Row, hf
from megatron_irl.families.tensors import Replicated
from megatron_irl.families.windows import DEFAULT_WINDOW, SLIDING, window_in

ACTIVATION = "gelu_pytorch_tanh"
DEFAULT_SCALAR = 256  # of transformers' config classes
_L = "model.layers.{}."


def _norm(megatron: str, name: str) -> Row:
    return Row(f"{LAYER}{megatron}.weight", Replicated(), (hf(f"{_L}{name}.weight", "hidden"),))


# What Llama calls post_attention_layernorm stands before its MLP; here it stands after attention.
_NORMS = {
    LAYER + "pre_mlp_layernorm.weight": (
        _norm("post_self_attn_layernorm", "post_attention_layernorm"),
        _norm("pre_mlp_layernorm", "pre_feedforward_layernorm"),
    ),
    LAYER + "mlp.linear_fc2.weight": (
        *(row for row in LLAMA_ROWS if row.megatron == LAYER + "mlp.linear_fc2.weight"),
        _norm("post_mlp_layernorm", "post_feedforward_layernorm"),
    ),
}
GEMMA_ROWS = tuple(new for row in LLAMA_ROWS for new in _NORMS.get(row.megatron, (row,)))


def gemma_like(
    hf_config: dict[str, Any], family: str, *, rope: dict[str, Any], types: list[str],
    attention_softcap: float | None, logit_softcap: float | None, qk_layernorm: bool = False,
    **options: Any,
) -> Architecture:
    """The architecture of a family of this kind.

    Args:
        hf_config: The whole config.json.
        family: Its HF class name.
        rope: What ``rope_settings`` gave, of the layers without a window.
        types: The kind of each layer.
        attention_softcap, logit_softcap: As of the ``Architecture``.
        qk_layernorm: Whether every query and key is normalised.
        options: Further fields of the ``Architecture`` by name.

    Raises:
        UserError: An option in use that is not implemented, by its key.
    """
    refuse(hf_config, "attention_bias", "use_bidirectional_attention")
    activation = hf_config.get("hidden_activation", ACTIVATION)
    if activation != ACTIVATION:
        raise UserError(
            f"config.json: hidden_activation {activation} is not supported ({ACTIVATION} is)."
        )
    groups, head_dim = _heads(hf_config, family)
    scalar = number({"query_pre_attn_scalar": DEFAULT_SCALAR} | hf_config, "query_pre_attn_scalar")
    windows = window_in(
        {"sliding_window": DEFAULT_WINDOW} | hf_config, [kind == SLIDING for kind in types]
    )
    return Architecture(
        family=family,
        transformer=transformer_fields(
            hf_config, groups=groups, head_dim=head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=number({"rms_norm_eps": 1e-6} | hf_config, "rms_norm_eps"),
            layernorm_zero_centered_gamma=True,
            gated_linear_unit=True,
            activation_func="gelu_tanh",
            add_bias_linear=False,
            add_qkv_bias=False,
            qk_layernorm=qk_layernorm,
            softmax_scale=scalar**-0.5,
            **windows,
        ),
        vocab_size=size(hf_config, "vocab_size"),
        max_sequence_length=size(hf_config, "max_position_embeddings"),
        rotary_base=number(rope, "rope_theta"),
        rotary_percent=1.0,
        inv_freq=inverse_frequencies(rope, head_dim),
        tie_word_embeddings=flag(hf_config, "tie_word_embeddings", default=True),
        sandwich_norms=True,
        attention_softcap=attention_softcap,
        logit_softcap=logit_softcap,
        embedding_scale=size(hf_config, "hidden_size") ** 0.5,
        **options,
    )


def _heads(hf_config: dict[str, Any], family: str) -> tuple[int, int]:
    """Key heads, and the size of a head; neither follows from the other sizes."""
    heads = size(hf_config, "num_attention_heads")
    groups = required_size(hf_config, "num_key_value_heads", heads, family)
    if heads % groups:
        raise UserError(
            f"config.json: num_attention_heads={heads} conflicts with "
            f"num_key_value_heads={groups}; it must be a multiple of it."
        )
    if "head_dim" not in hf_config:
        raise UserError(f"config.json: head_dim is missing, and {family} does not derive it.")
    return groups, size(hf_config, "head_dim")
