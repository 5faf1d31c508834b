"""``config.json`` of a Hugging Face folder → the architecture in Megatron's terms.

What is not implemented is refused by name, never approximated. Importable without Megatron.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_irl.convert.config_values import number, size
from megatron_irl.convert.rope import inverse_frequencies, rope_settings
from megatron_irl.convert.windows import window_fields
from megatron_irl.errors import UserError

CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"


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
        parallel_residual: Whether attention and MLP of a layer both read the layer's input.
        reward: Whether a reward head stands in the place of the language-model head.
    """

    family: str
    transformer: dict[str, Any]
    vocab_size: int
    max_sequence_length: int
    rotary_base: float
    rotary_percent: float
    inv_freq: Tensor
    tie_word_embeddings: bool
    parallel_residual: bool = False
    reward: bool = False

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by the names the family tables use."""
        t = self.transformer
        return {
            "one": 1,
            "vocab": self.vocab_size,
            "hidden": t["hidden_size"],
            "ffn": t["ffn_hidden_size"],
            "q": t["num_attention_heads"] * t["kv_channels"],
            "kv": t["num_query_groups"] * t["kv_channels"],
            "head": t["kv_channels"],
            "qkv": (t["num_attention_heads"] + 2 * t["num_query_groups"]) * t["kv_channels"],
        }


def read_hf_config(hf_dir: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        UserError: The folder or the file is missing, or it is not a JSON object.
    """
    path = Path(hf_dir) / "config.json"
    if (Path(hf_dir) / "adapter_config.json").exists() and not path.exists():
        raise UserError(
            f"model.hf={hf_dir} is an adapter of peft, not a model. Merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
            ".save_pretrained(merged), and copy the tokenizer there."
        )
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


def architecture(hf_config: dict[str, Any], *, reward_model: bool = False) -> Architecture:
    """Translate an HF config.

    Args:
        reward_model: Whether a sequence classifier with one label will do as well.

    Dropout is off whatever the config says: it regularises training and is the recipe's choice
    (``model.attention_dropout``), and it changes no evaluation.

    Raises:
        UserError: An architecture, or an option in use, that is not implemented; a reward model
            where a language model is needed; a key that is missing or not a number.
    """
    names = hf_config.get("architectures")
    family = names[0] if isinstance(names, list) and names else None
    if isinstance(family, str) and family.endswith(CLASSIFIER):
        _check_reward_model(hf_config, family, wanted=reward_model)
        causal = {"architectures": [family.removesuffix(CLASSIFIER) + CAUSAL]}
        return dataclasses.replace(architecture(hf_config | causal), reward=True)
    if family not in TRANSLATORS:
        raise UserError(
            f"config.json: architecture {family} (model_type {hf_config.get('model_type')}) is not "
            f"supported; supported are {', '.join(TRANSLATORS)}."
        )
    for key in ("quantization_config", "compression_config"):
        _refuse(hf_config, key)
    return TRANSLATORS[family](hf_config, family)


def _llama_like(hf_config: dict[str, Any], family: str) -> Architecture:
    """RMSNorm, gated MLP, grouped queries, RoPE over the whole head."""
    activation = hf_config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"config.json: hidden_act {activation} is not supported (silu is).")
    for key in ("attention_bias", "mlp_bias"):
        _refuse(hf_config, key)
    hidden, heads = size(hf_config, "hidden_size"), size(hf_config, "num_attention_heads")
    groups = _optional_size(hf_config, "num_key_value_heads", heads, family)
    if heads % groups or (hf_config.get("head_dim") is None and hidden % heads):
        raise UserError(
            f"config.json: num_attention_heads={heads} conflicts with num_key_value_heads={groups} "
            f"or hidden_size={hidden}; it must be a multiple of the former and divide the latter."
        )
    head_dim = _optional_size(hf_config, "head_dim", hidden // heads, family)
    rope = rope_settings(hf_config)
    if rope["partial_rotary_factor"] != 1:
        raise UserError("config.json: partial_rotary_factor other than 1 is not supported.")
    return Architecture(
        family=family,
        transformer=_transformer(
            hf_config, groups=groups, head_dim=head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=number(hf_config, "rms_norm_eps"),
            gated_linear_unit=True,
            activation_func=activation,
            add_bias_linear=False,
            add_qkv_bias=family == "Qwen2ForCausalLM",
            qk_layernorm=family == "Qwen3ForCausalLM",
            **window_fields(hf_config, family),
        ),
        vocab_size=size(hf_config, "vocab_size"),
        max_sequence_length=size(hf_config, "max_position_embeddings"),
        rotary_base=number(rope, "rope_theta"),
        rotary_percent=1.0,
        inv_freq=inverse_frequencies(rope, head_dim),
        tie_word_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
    )


def _gpt_neox(hf_config: dict[str, Any], family: str) -> Architecture:
    """LayerNorm and biases everywhere, plain MLP, RoPE over a part of the head."""
    activation = hf_config.get("hidden_act", "gelu")
    if activation not in NEOX_ACTIVATIONS:
        raise UserError(
            f"config.json: hidden_act {activation} is not supported; supported are "
            f"{', '.join(NEOX_ACTIVATIONS)}."
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
        family=family,
        transformer=_transformer(
            hf_config, groups=heads, head_dim=hidden // heads,
            normalization="LayerNorm",
            layernorm_epsilon=number({"layer_norm_eps": 1e-5} | hf_config, "layer_norm_eps"),
            gated_linear_unit=False,
            activation_func=NEOX_ACTIVATIONS[activation],
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


def _check_reward_model(hf_config: dict[str, Any], family: str, *, wanted: bool) -> None:
    if not wanted:
        raise UserError(
            f"config.json: {family} is a reward model without a language-model head. Give the "
            "language model; a run that wrote hf_reward/ has it in hf/."
        )
    labels = hf_config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else hf_config.get("num_labels", 2)
    if count != 1:
        raise UserError(f"config.json: {family} has {count} labels; a reward model has one.")


# Which function reads which architecture; the name tables are in families.py.
TRANSLATORS: dict[str, Callable[[dict[str, Any], str], Architecture]] = {
    "LlamaForCausalLM": _llama_like,
    "MistralForCausalLM": _llama_like,
    "Qwen2ForCausalLM": _llama_like,
    "Qwen3ForCausalLM": _llama_like,
    "GPTNeoXForCausalLM": _gpt_neox,
}

# HF's names → ours; gelu is exact, the others are its tanh approximation.
NEOX_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}

# Left out, these take a constant of the HF class instead of following from the other sizes.
NOT_DERIVED = {
    "MistralForCausalLM": ("num_key_value_heads",),
    "Qwen2ForCausalLM": ("num_key_value_heads",),
    "Qwen3ForCausalLM": ("num_key_value_heads", "head_dim"),
}


def _transformer(
    hf_config: dict[str, Any], *, groups: int, head_dim: int, **rest: Any
) -> dict[str, Any]:
    return {
        "num_layers": size(hf_config, "num_hidden_layers"),
        "hidden_size": size(hf_config, "hidden_size"),
        "ffn_hidden_size": size(hf_config, "intermediate_size"),
        "num_attention_heads": size(hf_config, "num_attention_heads"),
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **rest,
    }


def _refuse(config: dict[str, Any], key: str) -> None:
    if config.get(key):
        raise UserError(f"config.json: {key}={config[key]} is not supported.")


def _optional_size(config: dict[str, Any], key: str, default: int, family: str) -> int:
    """A size that may be left out where the family derives it."""
    if key not in config and key in NOT_DERIVED.get(family, ()):
        raise UserError(f"config.json: {key} is missing, and {family} does not derive it.")
    return default if config.get(key) is None else size(config, key)
