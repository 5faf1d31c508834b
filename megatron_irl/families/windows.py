"""Sliding-window attention of a ``config.json`` in Megatron's terms.

A window of W lets a token see itself and W - 1 tokens before it. Each function gives
TransformerConfig fields: none where no layer has a window that can matter.
"""

from typing import Any

from megatron_irl.errors import UserError
from megatron_irl.families.config_values import size

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT_WINDOW, DEFAULT_FULL_LAYERS = 4096, 28  # of transformers' config classes


def no_window(config: dict[str, Any], family: str) -> dict[str, Any]:
    """A family without windows.

    Raises:
        UserError: The config asks for one that would matter.
    """
    window = config.get("sliding_window")
    if window and window < config.get("max_position_embeddings", 0):
        raise UserError(f"config.json: sliding_window={window} is not supported by {family}.")
    _check_types(config, [FULL])
    return {}


def window_everywhere(config: dict[str, Any]) -> dict[str, Any]:
    """One window in every layer, unless ``sliding_window`` is null.

    Raises:
        UserError: A window that is no number, or layer types that contradict it.
    """
    window = config.get("sliding_window", DEFAULT_WINDOW)
    _check_types(config, [SLIDING if window else FULL])
    return _window_size(config, window)


def window_in_some_layers(config: dict[str, Any]) -> dict[str, Any]:
    """A window where ``use_sliding_window`` asks for it.

    It is in the layers that ``layer_types`` names or, without that list, from
    ``max_window_layers`` on.

    Raises:
        UserError: A window that is no number, or layer types that contradict it.
    """
    window = config.get("sliding_window", DEFAULT_WINDOW)
    window = window if config.get("use_sliding_window") else None
    _check_types(config, [FULL, SLIDING] if window else [FULL])
    if not _window_size(config, window):
        return {}
    first = config.get("max_window_layers", DEFAULT_FULL_LAYERS)
    layers = range(size(config, "num_hidden_layers"))
    types = layer_types(config, [SLIDING if i >= first else FULL for i in layers])
    return window_in(config, [kind == SLIDING for kind in types])


def window_in(config: dict[str, Any], layers: list[bool]) -> dict[str, Any]:
    """The window of ``sliding_window`` in the layers that are marked."""
    fields = _window_size(config, config.get("sliding_window", DEFAULT_WINDOW))
    if not fields or not any(layers):
        return {}
    return fields | {"window_attn_skip_freq": [int(marked) for marked in layers]}


def layer_types(config: dict[str, Any], default: list[str]) -> list[str]:
    """The kind of each layer, as stated or else ``default``.

    Raises:
        UserError: The list is not as long as the model, or names another kind.
    """
    _check_types(config, [FULL, SLIDING])
    types = config.get("layer_types") or default
    if len(types) != size(config, "num_hidden_layers"):
        raise UserError(
            f"config.json: layer_types has {len(types)} entries, which conflicts with "
            f"num_hidden_layers={config['num_hidden_layers']}."
        )
    return types


def _window_size(config: dict[str, Any], window: Any) -> dict[str, Any]:
    if window is None:
        return {}
    window = size({"sliding_window": window}, "sliding_window")
    if window >= size(config, "max_position_embeddings"):
        return {}
    return {"window_size": (window - 1, 0)}


def _check_types(config: dict[str, Any], allowed: list[str]) -> None:
    others = sorted(set(config.get("layer_types") or ()) - set(allowed))
    if others:
        raise UserError(
            f"config.json: layer_types {others} is not supported here; with this sliding_window "
            f"the family has {' and '.join(allowed)} layers."
        )
