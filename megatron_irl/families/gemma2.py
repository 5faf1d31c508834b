"""Gemma 2: four norms in a layer, soft caps on scores and logits, every other layer a window."""

from typing import Any

from megatron_irl.families.architecture import Architecture, Family
from megatron_irl.families.config_values import optional_number, size
from megatron_irl.families.gemma_like import GEMMA_ROWS, gemma_like
from megatron_irl.families.rope import rope_settings
from megatron_irl.families.windows import FULL, SLIDING, layer_types

NAME = "Gemma2ForCausalLM"


def _read(hf_config: dict[str, Any]) -> Architecture:
    layers = range(size(hf_config, "num_hidden_layers"))
    return gemma_like(
        hf_config, NAME, rope=rope_settings(hf_config, types=("default", "linear")),
        types=layer_types(hf_config, [FULL if i % 2 else SLIDING for i in layers]),
        attention_softcap=optional_number(hf_config, "attn_logit_softcapping", 50.0),
        logit_softcap=optional_number(hf_config, "final_logit_softcapping", 30.0),
    )


GEMMA2 = Family(NAME, "gemma2", _read, GEMMA_ROWS)
