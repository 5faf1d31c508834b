"""The name table of a model: its family's rows with layers spelled out, and other spellings."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_irl.families.architecture import Architecture
from megatron_irl.families.registry import FAMILIES
from megatron_irl.families.rows import (
    ADAPTER,
    EMBEDDING,
    HEAD,
    REWARD_HEAD,
    REWARD_ROW,
    HfTensor,
    Row,
    is_of_expert,
)
from megatron_irl.families.tensors import Heads

__all__ = [
    "ADAPTER", "BUFFERS", "EMBEDDING", "HEAD", "REWARD_HEAD", "REWARD_ROW", "HfTensor", "Row",
    "canonical", "cast_to", "heads", "hf_head", "hf_tensors", "is_of_expert", "row_groups", "rows",
    "stored_name",
]

# Transformer Engine fuses each norm into the linear layer that follows it.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}

# Tensors that older versions of transformers saved and that hold no weights.
BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


def row_groups(arch: Architecture) -> Iterator[tuple[str, list[Row]]]:
    """(what it is, its rows) for the embedding, each layer and the head, in forward order."""
    table = [row for row in FAMILIES[arch.family].rows if row.applies(arch)]
    single = [r for r in table if "{}" not in r.megatron]
    yield "embedding", [r for r in single if r.megatron == EMBEDDING]
    for layer in range(arch.transformer["num_layers"]):
        yield f"layer {layer}", list(_layer_rows(table, layer, arch.dims["experts"]))
    yield "head", [r for r in single if r.megatron != EMBEDDING]


def _layer_rows(table: Sequence[Row], layer: int, experts: int) -> Iterator[Row]:
    of_experts = [row for row in table if row.of_experts]
    for row in table:
        if row.of_experts and row is of_experts[0]:
            yield from (r.at(layer, expert) for expert in range(experts) for r in of_experts)
        elif "{}" in row.megatron and not row.of_experts:
            yield row.at(layer)


def rows(arch: Architecture) -> Iterator[Row]:
    """Every row of a model, layers spelled out, in the order of the forward pass."""
    for _, group in row_groups(arch):
        yield from group


def canonical(name: str) -> str:
    """A Megatron parameter's name in the local spec's spelling."""
    for fused, plain in FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def stored_name(name: str) -> tuple[str, int | None]:
    """Where a distributed checkpoint keeps a canonical parameter: (name, index) or (name, None).

    Layers of one kind are one tensor there with the layer as its first dimension, and the norms
    have Transformer Engine's names under either spec.
    """
    for fused, plain in FUSED_NORMS.items():
        name = name.replace("." + plain, "." + fused)
    head, _, rest = name.partition("decoder.layers.")
    if head or not rest:
        return name, None
    layer, _, parameter = rest.partition(".")
    return f"decoder.layers.{parameter}", int(layer)


def cast_to(row: Row, dtype: torch.dtype) -> torch.dtype:
    """What a row becomes when weights are cast; a reward head stays float32."""
    return torch.float32 if row is REWARD_ROW else dtype


def hf_head(arch: Architecture) -> str:
    """What the family calls its output head."""
    (row,) = (row for row in FAMILIES[arch.family].rows if row.megatron == HEAD)
    return row.hf[0].name


def hf_tensors(row: Row, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
    """A row's HF tensors from all tensor-parallel shards; a vocabulary's padding is cut off."""
    whole = row.transform.write(shards, heads(arch))
    return [t[: hf.shape(arch)[0]] for t, hf in zip(whole, row.hf, strict=True)]


def heads(arch: Architecture) -> Heads:
    """What the attention transforms need to know."""
    return Heads(arch.transformer["num_query_groups"], arch.transformer["kv_channels"])
