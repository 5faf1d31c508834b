"""Gemma 3, text only: as Gemma 2 with normalised queries and keys, and two RoPE bases.

Layers with a window rotate by a base of their own. What pairs the text model with an image
encoder has another class name and is not supported.
"""

from typing import Any

from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture, Family
from megatron_irl.families.config_values import optional_number, optional_size, size
from megatron_irl.families.gemma_like import GEMMA_ROWS, gemma_like
from megatron_irl.families.rope import inverse_frequencies, rope_settings
from megatron_irl.families.windows import FULL, SLIDING, layer_types

NAME = "Gemma3ForCausalLM"
GLOBAL_BASE, LOCAL_BASE, PATTERN = 1e6, 1e4, 6  # of transformers' config class
TYPES = ("default", "linear")


def _read(hf_config: dict[str, Any]) -> Architecture:
    pattern = optional_size(hf_config, "sliding_window_pattern", PATTERN)
    layers = range(1, size(hf_config, "num_hidden_layers") + 1)
    types = layer_types(hf_config, [SLIDING if i % pattern else FULL for i in layers])
    rope, local = _ropes(hf_config)
    return gemma_like(
        hf_config, NAME, rope=rope, types=types, qk_layernorm=True,
        attention_softcap=optional_number(hf_config, "attn_logit_softcapping", None),
        logit_softcap=optional_number(hf_config, "final_logit_softcapping", None),
        local_inv_freq=inverse_frequencies(local, size(hf_config, "head_dim")),
        local_rope_layers=tuple(kind == SLIDING for kind in types),
    )


def _ropes(hf_config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """RoPE settings of the layers without and with a window; older files have keys of their own."""
    nested = hf_config.get("rope_parameters") or {}
    if nested and not set(nested) <= {FULL, SLIDING}:
        raise UserError(
            f"config.json: rope_parameters has the keys {', '.join(nested)}; {NAME} has one set "
            f"under {FULL} and one under {SLIDING}."
        )
    scaling = hf_config.get("rope_scaling")
    both = {
        "rope_parameters": nested.get(FULL), "rope_scaling": scaling if not nested else None,
        "rope_theta": hf_config.get("rope_theta") or GLOBAL_BASE,
    }
    local = {
        "rope_parameters": nested.get(SLIDING),
        "rope_theta": hf_config.get("rope_local_base_freq") or LOCAL_BASE,
    }
    return rope_settings(both, types=TYPES), rope_settings(local, types=TYPES)


# Gemma3ForSequenceClassification is the one with an image encoder.
GEMMA3 = Family(
    NAME, "gemma3_text", _read, GEMMA_ROWS, classifier="Gemma3TextForSequenceClassification"
)
