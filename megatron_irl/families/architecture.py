"""What a family's file gives: an ``Architecture`` from a config, and the family itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_irl.families.config_values import size

if TYPE_CHECKING:
    from megatron_irl.families.rows import Row

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
        proj_bias: Whether attention's output projection has a bias (``add_bias_linear`` is off).
        mlp_bias: Whether the MLP's projections have biases (``add_bias_linear`` is off).
        rope_scale: What cosines and sines are multiplied by.
        local_inv_freq: As ``inv_freq``, of the layers that ``local_rope_layers`` names.
        local_rope_layers: By layer, whether ``local_inv_freq`` is used; empty: nowhere.
        sandwich_norms: Whether what attention and MLP give is normalised before it is added.
        attention_softcap: c of c tanh(score / c), applied to scaled attention scores.
        logit_softcap: c of c tanh(logit / c), applied to the output head's logits.
        embedding_scale: What word embeddings are multiplied by.
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
    proj_bias: bool = False
    mlp_bias: bool = False
    rope_scale: float = 1.0
    local_inv_freq: Tensor | None = None
    local_rope_layers: tuple[bool, ...] = ()
    sandwich_norms: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None

    @property
    def local_only(self) -> str | None:
        """What of the model Transformer Engine's layers do not do; None: nothing."""
        if self.attention_softcap is not None:
            return "soft-capped attention scores"
        return "norms after attention and MLP" if self.sandwich_norms else None

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by the names the families' rows use."""
        t = self.transformer
        return {
            "one": 1,
            "layers": t["num_layers"],
            "experts": t.get("num_moe_experts") or 0,
            "vocab": self.vocab_size,
            "hidden": t["hidden_size"],
            "ffn": t["ffn_hidden_size"],
            "gate_up": 2 * t["ffn_hidden_size"],
            "q": t["num_attention_heads"] * t["kv_channels"],
            "kv": t["num_query_groups"] * t["kv_channels"],
            "head": t["kv_channels"],
            "qkv": (t["num_attention_heads"] + 2 * t["num_query_groups"]) * t["kv_channels"],
        }


@dataclass(frozen=True)
class Family:
    """A model family, as its file describes it.

    Attributes:
        name: The HF architecture's class name, of the causal language model.
        model_type: transformers' name for it in ``config.json``.
        read: ``config.json`` → ``Architecture``; raises UserError by key for what is not
            implemented.
        rows: Which HF tensors make which Megatron parameter, in the order of the forward pass.
        classifier: The HF class of its sequence classifier, which a reward model is; empty: as of
            most families, named after the language model.
    """

    name: str
    model_type: str
    read: Callable[[dict[str, Any]], Architecture]
    rows: "tuple[Row, ...]"
    classifier: str = ""

    @property
    def classifier_name(self) -> str:
        return self.classifier or self.name.removesuffix(CAUSAL) + CLASSIFIER


def transformer_fields(
    hf_config: dict[str, Any], *, groups: int, head_dim: int, **rest: Any
) -> dict[str, Any]:
    """TransformerConfig fields of every family, and ``rest``.

    Dropout is off whatever the config says: it regularises training and is the recipe's choice
    (``model.attention_dropout``), and it changes no evaluation.
    """
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
