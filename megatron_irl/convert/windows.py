"""Sliding-window attention of a ``config.json`` in Megatron's terms."""

from typing import Any

from megatron_irl.convert.config_values import size
from megatron_irl.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT_WINDOW, DEFAULT_FULL_LAYERS = 4096, 28  # of transformers' config classes


def window_fields(config: dict[str, Any], family: str) -> dict[str, Any]:
    """TransformerConfig fields; none where no layer has a window that can matter.

    A window of W lets a token see itself and W - 1 tokens before it. Mistral has one in every
    layer. Qwen has one where ``use_sliding_window`` asks for it, in the layers that
    ``layer_types`` names or, without that list, from ``max_window_layers`` on.

    Raises:
        UserError: A window in a family that has none, or layer types that contradict it.
    """
    types = config.get("layer_types")
    if family == "MistralForCausalLM":
        window = config.get("sliding_window", DEFAULT_WINDOW)
        _check_types(config, [SLIDING if window else FULL])
    elif family.startswith("Qwen"):
        window = config.get("sliding_window", DEFAULT_WINDOW)
        window = window if config.get("use_sliding_window") else None
        _check_types(config, [FULL, SLIDING] if window else [FULL])
    else:
        window = config.get("sliding_window")
        if window and window < config.get("max_position_embeddings", 0):
            raise UserError(f"config.json: sliding_window={window} is not supported by {family}.")
        _check_types(config, [FULL])
        return {}
    if window is None:
        return {}
    window = size({"sliding_window": window}, "sliding_window")
    if window >= size(config, "max_position_embeddings"):
        return {}
    fields: dict[str, Any] = {"window_size": (window - 1, 0)}
    if family.startswith("Qwen"):
        number_of_layers = size(config, "num_hidden_layers")
        first = config.get("max_window_layers", DEFAULT_FULL_LAYERS)
        types = types or [SLIDING if i >= first else FULL for i in range(number_of_layers)]
        if len(types) != number_of_layers:
            raise UserError(
                f"config.json: layer_types has {len(types)} entries, which conflicts with "
                f"num_hidden_layers={number_of_layers}."
            )
        fields["window_attn_skip_freq"] = [int(kind == SLIDING) for kind in types]
        return fields if SLIDING in types else {}
    return fields


def _check_types(config: dict[str, Any], allowed: list[str]) -> None:
    others = sorted(set(config.get("layer_types") or ()) - set(allowed))
    if others:
        raise UserError(
            f"config.json: layer_types {others} is not supported here; with this sliding_window "
            f"the family has {' and '.join(allowed)} layers."
        )
