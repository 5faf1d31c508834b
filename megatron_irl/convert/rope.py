"""RoPE settings of a ``config.json``, in whatever form it was written, and their frequencies."""

import math
from typing import Any

import torch
from torch import Tensor

from megatron_irl.convert.config_values import number
from megatron_irl.errors import UserError

ROPE_TYPES = ("default", "linear", "llama3")


def rope_settings(
    hf_config: dict[str, Any], *, theta_key: str = "rope_theta",
    percent_key: str = "partial_rotary_factor", default_percent: float = 1.0,
) -> dict[str, Any]:
    """RoPE settings in one form; transformers 5 writes rope_parameters, older ones several keys.

    Args:
        hf_config: The whole config.json.
        theta_key, percent_key: What older versions call the base and the rotated share of a head.
        default_percent: The share where none is stated.

    Returns:
        ``rope_type``, ``rope_theta``, ``partial_rotary_factor`` and the type's own keys.

    Raises:
        UserError: Two statements that differ, a type that is not implemented, a wrong number.
    """
    new, old = hf_config.get("rope_parameters") or {}, hf_config.get("rope_scaling") or {}
    if new and old and new != old:
        raise UserError(
            f"config.json: rope_parameters={new} conflicts with rope_scaling={old}; both name the "
            "same thing. Remove one."
        )
    rope = dict(new or old)
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = hf_config.get(theta_key) or 10000.0
    if rope.get("partial_rotary_factor") is None:
        stated = hf_config.get(percent_key)
        rope["partial_rotary_factor"] = default_percent if stated is None else stated
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ROPE_TYPES:
        raise UserError(
            f"config.json: rope_type {rope['rope_type']} is not supported; supported are "
            f"{', '.join(ROPE_TYPES)}."
        )
    if rope["rope_type"] == "llama3":
        key = "original_max_position_embeddings"  # transformers' order of precedence
        rope[key] = hf_config.get(key) or rope.get(key) or hf_config.get("max_position_embeddings")
    if number(rope, "partial_rotary_factor") > 1:
        raise UserError(
            f"config.json: {percent_key}={rope['partial_rotary_factor']} is above 1; it is the "
            "share of a head that is rotated."
        )
    return rope


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> Tensor:
    """RoPE inverse frequencies, float32 [rotated dims / 2], of types default, linear and llama3.

    llama3 keeps wavelengths under ``original / high_freq_factor``, divides those over
    ``original / low_freq_factor`` by ``factor``, and blends linearly in between.
    """
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    exponent = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    plain = 1.0 / (number(rope, "rope_theta") ** exponent)
    kind = rope["rope_type"]
    if kind == "default":
        return plain
    factor = number(rope, "factor")
    if kind == "linear":
        return plain / factor
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    original = number(rope, "original_max_position_embeddings")
    wavelength = 2 * math.pi / plain
    blend = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * plain / factor + blend * plain
