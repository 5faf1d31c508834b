"""What a transformer layer of our own hands on to Megatron's self-attention."""

from collections.abc import Mapping
from typing import Any

# Of ``TransformerLayer.forward``; upstream's layer names them one by one as well.
NAMES = (
    "attention_mask", "inference_context", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin",
    "rotary_pos_cos_sin", "attention_bias", "packed_seq_params", "sequence_len_offset",
)


def for_self_attention(options: Mapping[str, Any], **instead: Any) -> dict[str, Any]:
    """The keywords of self-attention among those of a layer; ``instead`` replaces some."""
    return {name: options.get(name) for name in NAMES} | instead
