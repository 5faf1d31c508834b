"""``config.json`` of a Hugging Face folder → the architecture in Megatron's terms.

What is not implemented is refused by name, never approximated. Importable without Megatron.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_irl.errors import UserError

# One name table serves these; see families.py.
SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# Left out, these take a constant of the HF class instead of following from the other sizes.
NOT_DERIVED = {
    "MistralForCausalLM": ("num_key_value_heads",),
    "Qwen2ForCausalLM": ("num_key_value_heads",),
    "Qwen3ForCausalLM": ("num_key_value_heads", "head_dim"),
}


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model's shape.

    Attributes:
        family: The HF architecture's class name.
        transformer: Megatron ``TransformerConfig`` fields by name; ``activation_func`` is a name.
        vocab_size: Rows of the embedding.
        max_sequence_length: Positions the model was made for.
        rotary_base, rotary_percent: As Megatron's GPTModel takes them.
        inv_freq: float32 [rotary dims / 2], inverse frequencies after the family's scaling.
        tie_word_embeddings: Whether the output head is the embedding.
    """

    family: str
    transformer: dict[str, Any]
    vocab_size: int
    max_sequence_length: int
    rotary_base: float
    rotary_percent: float
    inv_freq: Tensor
    tie_word_embeddings: bool

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by the names the family tables use."""
        t = self.transformer
        return {
            "vocab": self.vocab_size,
            "hidden": t["hidden_size"],
            "ffn": t["ffn_hidden_size"],
            "q": t["num_attention_heads"] * t["kv_channels"],
            "kv": t["num_query_groups"] * t["kv_channels"],
            "head": t["kv_channels"],
        }


def read_hf_config(hf_dir: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        UserError: The folder or the file is missing, or it is not a JSON object.
    """
    path = Path(hf_dir) / "config.json"
    if not Path(hf_dir).is_dir():
        raise UserError(
            f"model.hf={hf_dir} is not a folder. Set model.hf to a Hugging Face model folder on "
            "this machine; nothing is downloaded."
        )
    if not path.exists():
        raise UserError(f"model.hf={hf_dir} has no config.json; it is not a Hugging Face folder.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object.")
    return config


def architecture(hf_config: dict[str, Any]) -> Architecture:
    """Translate an HF config.

    Dropout is off whatever the config says: it regularises training and is the recipe's choice
    (``model.attention_dropout``), and it changes no evaluation.

    Raises:
        UserError: An architecture, or an option in use, that is not implemented; a key that is
            missing or not a number.
    """
    family = _family(hf_config)
    _refuse_unsupported(hf_config, family)
    hidden, heads = _size(hf_config, "hidden_size"), _size(hf_config, "num_attention_heads")
    groups = _optional_size(hf_config, "num_key_value_heads", heads, family)
    if heads % groups or (hf_config.get("head_dim") is None and hidden % heads):
        raise UserError(
            f"config.json: num_attention_heads={heads} conflicts with num_key_value_heads={groups} "
            f"or hidden_size={hidden}; it must be a multiple of the former and divide the latter."
        )
    head_dim = _optional_size(hf_config, "head_dim", hidden // heads, family)
    rope = _rope(hf_config)
    return Architecture(
        family=family,
        transformer={
            "num_layers": _size(hf_config, "num_hidden_layers"),
            "hidden_size": hidden,
            "ffn_hidden_size": _size(hf_config, "intermediate_size"),
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "kv_channels": head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": _number(hf_config, "rms_norm_eps"),
            "gated_linear_unit": True,
            "activation_func": hf_config.get("hidden_act", "silu"),
            "add_bias_linear": False,
            "add_qkv_bias": family == "Qwen2ForCausalLM",
            "qk_layernorm": family == "Qwen3ForCausalLM",
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        },
        vocab_size=_size(hf_config, "vocab_size"),
        max_sequence_length=_size(hf_config, "max_position_embeddings"),
        rotary_base=_number(rope, "rope_theta"),
        rotary_percent=1.0,
        inv_freq=inverse_frequencies(rope, head_dim),
        tie_word_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
    )


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> Tensor:
    """RoPE inverse frequencies [head_dim / 2] of rope types default, linear and llama3.

    llama3 keeps wavelengths under ``original / high_freq_factor``, divides those over
    ``original / low_freq_factor`` by ``factor``, and blends linearly in between.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (_number(rope, "rope_theta") ** exponent)
    kind = rope["rope_type"]
    if kind == "default":
        return plain
    factor = _number(rope, "factor")
    if kind == "linear":
        return plain / factor
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    original = _number(rope, "original_max_position_embeddings")
    wavelength = 2 * math.pi / plain
    blend = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * plain / factor + blend * plain


def _family(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    family = names[0] if isinstance(names, list) and names else None
    if family not in SUPPORTED:
        raise UserError(
            f"config.json: architecture {family} (model_type {config.get('model_type')}) is not "
            f"supported; supported are {', '.join(SUPPORTED)}."
        )
    return family


def _rope(hf_config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings in one form; transformers 5 writes rope_parameters, older ones two keys."""
    new, old = hf_config.get("rope_parameters") or {}, hf_config.get("rope_scaling") or {}
    if new and old and new != old:
        raise UserError(
            f"config.json: rope_parameters={new} conflicts with rope_scaling={old}; both name the "
            "same thing. Remove one."
        )
    rope = dict(new or old)
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = hf_config.get("rope_theta") or 10000.0
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UserError(
            f"config.json: rope_type {rope['rope_type']} is not supported; supported are default, "
            "linear and llama3."
        )
    if rope["rope_type"] == "llama3":
        key = "original_max_position_embeddings"  # transformers' order of precedence
        rope[key] = hf_config.get(key) or rope.get(key) or hf_config.get("max_position_embeddings")
    if (rope.get("partial_rotary_factor") or hf_config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor other than 1 is not supported.")
    return rope


def _refuse_unsupported(config: dict[str, Any], family: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"config.json: hidden_act {activation} is not supported (silu is).")
    for key in ("attention_bias", "mlp_bias", "quantization_config", "compression_config"):
        if config.get(key):
            raise UserError(f"config.json: {key}={config[key]} is not supported.")
    layer_types = set(config.get("layer_types") or ()) - {"full_attention"}
    # Qwen states a window but uses it only when asked to; a Mistral config without one has 4096.
    window = config.get("sliding_window", 4096 if family == "MistralForCausalLM" else None)
    if family.startswith("Qwen") and not config.get("use_sliding_window"):
        window = None
    if layer_types:
        raise UserError(f"config.json: layer_types {sorted(layer_types)} is not supported.")
    if window and window < config.get("max_position_embeddings", 0):
        raise UserError(
            f"config.json: sliding_window={window} is not supported for sequences longer than it; "
            f"max_position_embeddings is {config['max_position_embeddings']}. Set it to {window} "
            "in config.json if your sequences are shorter."
        )


def _size(config: dict[str, Any], key: str) -> int:
    """A positive whole number that must be there."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {_state(config, key)}; it must be a positive whole number.")
    return value


def _optional_size(config: dict[str, Any], key: str, default: int, family: str) -> int:
    """A size that may be left out where the family derives it."""
    if key not in config and key in NOT_DERIVED.get(family, ()):
        raise UserError(f"config.json: {key} is missing, and {family} does not derive it.")
    return default if config.get(key) is None else _size(config, key)


def _number(config: dict[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise UserError(f"config.json: {_state(config, key)}; it must be a positive number.")
    return float(value)


def _state(config: dict[str, Any], key: str) -> str:
    return f"{key}={config[key]!r}" if key in config else f"{key} is missing"
