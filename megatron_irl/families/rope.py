"""RoPE settings of a ``config.json``, in whatever form it was written, and their frequencies."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_irl.errors import UserError
from megatron_irl.families.config_values import number, size

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LONGROPE = "longrope"  # of Phi alone, whose older files call it su or yarn
ORIGINAL = "original_max_position_embeddings"


def rope_settings(
    hf_config: dict[str, Any], *, theta_key: str = "rope_theta",
    percent_key: str = "partial_rotary_factor", default_percent: float = 1.0,
    types: Sequence[str] = ROPE_TYPES,
) -> dict[str, Any]:
    """RoPE settings in one form; transformers 5 writes rope_parameters, older ones several keys.

    Args:
        hf_config: The whole config.json.
        theta_key, percent_key: What older versions call the base and the rotated share of a head.
        default_percent: The share where none is stated.
        types: Kinds of RoPE that the family may have.

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
    if LONGROPE in types and rope["rope_type"] in ("su", "yarn"):
        rope["rope_type"] = LONGROPE
    if rope["rope_type"] not in types:
        raise UserError(
            f"config.json: rope_type {rope['rope_type']} is not supported; supported are "
            f"{', '.join(types)}."
        )
    if rope["rope_type"] not in ("default", "linear"):  # transformers' order of precedence
        longest = hf_config.get("max_position_embeddings")
        rope[ORIGINAL] = hf_config.get(ORIGINAL) or rope.get(ORIGINAL) or longest
    if rope["rope_type"] in ("yarn", LONGROPE) and rope.get("factor") is None:
        rope["factor"] = size(hf_config, "max_position_embeddings") / number(rope, ORIGINAL)
    if number(rope, "partial_rotary_factor") > 1:
        raise UserError(
            f"config.json: {percent_key}={rope['partial_rotary_factor']} is above 1; it is the "
            "share of a head that is rotated."
        )
    return rope


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> Tensor:
    """RoPE inverse frequencies, float32 [rotated dims / 2].

    llama3 keeps wavelengths under ``original / high_freq_factor``, divides those over
    ``original / low_freq_factor`` by ``factor``, and blends linearly in between. yarn blends by
    dimension: those that turn more than ``beta_fast`` times within the original length keep their
    frequency, those under ``beta_slow`` turns are divided by ``factor``. longrope divides each by
    its short factor, which holds up to the original length.
    """
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    exponent = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    kind = rope["rope_type"]
    if kind == LONGROPE:
        return 1.0 / (_short_factors(rope, rotated) * number(rope, "rope_theta") ** exponent)
    plain = 1.0 / (number(rope, "rope_theta") ** exponent)
    if kind == "default":
        return plain
    factor = number(rope, "factor")
    if kind == "linear":
        return plain / factor
    if kind == "yarn":
        kept = 1 - _yarn_ramp(rope, rotated)
        return plain / factor * (1 - kept) + plain * kept
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    wavelength = 2 * math.pi / plain
    blend = ((number(rope, ORIGINAL) / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * plain / factor + blend * plain


def rope_scale(rope: dict[str, Any]) -> float:
    """What cosines and sines are multiplied by: 1, but for yarn and longrope."""
    if rope["rope_type"] not in ("yarn", LONGROPE):
        return 1.0
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")
    factor = number(rope, "factor")
    if rope["rope_type"] == LONGROPE:
        growth = math.log(factor) / math.log(number(rope, ORIGINAL)) if factor > 1 else 0.0
        return math.sqrt(1 + growth)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        top, bottom = number(rope, "mscale"), number(rope, "mscale_all_dim")
        return _mscale(factor, top) / _mscale(factor, bottom)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _short_factors(rope: dict[str, Any], rotated: int) -> Tensor:
    stated = rope.get("short_factor")
    factors = stated if isinstance(stated, list) else []
    positive = all(isinstance(f, (int, float)) and f > 0 for f in factors)
    if not positive or len(factors) != rotated // 2:
        raise UserError(
            f"config.json: short_factor of rope_scaling must be a list of {rotated // 2} positive "
            "numbers, one for every rotated pair of a head's dimensions."
        )
    return torch.tensor(factors, dtype=torch.float32)


def _yarn_ramp(rope: dict[str, Any], rotated: int) -> Tensor:
    """float32 [rotated / 2]: 0 where a dimension keeps its frequency, 1 where it is divided."""
    original, base = number(rope, ORIGINAL), number(rope, "rope_theta")

    def dimension(turns: float) -> float:
        """The dimension that makes so many turns within the original length."""
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = dimension(number({"beta_fast": rope.get("beta_fast") or 32}, "beta_fast"))
    last = dimension(number({"beta_slow": rope.get("beta_slow") or 1}, "beta_slow"))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    width = last - first or 0.001
    return ((torch.arange(rotated // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
