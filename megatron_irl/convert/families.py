"""The name table: which HF tensors make which Megatron parameter. One mapping, used both ways.

``{}`` is the global layer number. Dimensions are names of ``Architecture.dims``, so that a folder
can be checked from its headers alone. A row with ``when`` applies only where the architecture has
that property: a TransformerConfig field that is on, ``untied`` embeddings, or a ``reward`` head in
the place of the output head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_irl.convert.hf_config import Architecture
from megatron_irl.convert.tensors import (
    GateUp,
    Heads,
    Qkv,
    Replicated,
    Split,
    Transform,
    Vocabulary,
)


@dataclass(frozen=True)
class HfTensor:
    """An HF tensor by name, with the names of its dimensions."""

    name: str
    dims: tuple[str, ...]

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        return tuple(arch.dims[d] for d in self.dims)


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the HF tensors it is made of."""

    megatron: str
    transform: Transform
    hf: tuple[HfTensor, ...]
    when: str | None = None

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        """Of the whole Megatron parameter, all tensor-parallel shards together."""
        shapes = [t.shape(arch) for t in self.hf]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def at(self, layer: int) -> "Row":
        """The row of one layer."""
        hf = tuple(HfTensor(t.name.format(layer), t.dims) for t in self.hf)
        return Row(self.megatron.format(layer), self.transform, hf, self.when)


def _t(name: str, *dims: str) -> HfTensor:
    return HfTensor(name, dims)


EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
REWARD_HEAD = "reward_head"  # the attribute that model.reward_head gives the last chunk

# transformers' sequence classifiers of every family call it that.
REWARD_ROW = Row(
    f"{REWARD_HEAD}.weight", Replicated(), (_t("score.weight", "one", "hidden"),), when="reward"
)

_L, _M = "model.layers.{}.", "decoder.layers.{}."

LLAMA_LIKE = (
    Row("embedding.word_embeddings.weight", Vocabulary(),
        (_t("model.embed_tokens.weight", "vocab", "hidden"),)),
    Row(_M + "input_layernorm.weight", Replicated(),
        (_t(_L + "input_layernorm.weight", "hidden"),)),
    Row(_M + "self_attention.linear_qkv.weight", Qkv(),
        (_t(_L + "self_attn.q_proj.weight", "q", "hidden"),
         _t(_L + "self_attn.k_proj.weight", "kv", "hidden"),
         _t(_L + "self_attn.v_proj.weight", "kv", "hidden"))),
    Row(_M + "self_attention.linear_qkv.bias", Qkv(),
        (_t(_L + "self_attn.q_proj.bias", "q"),
         _t(_L + "self_attn.k_proj.bias", "kv"),
         _t(_L + "self_attn.v_proj.bias", "kv")), when="add_qkv_bias"),
    Row(_M + "self_attention.q_layernorm.weight", Replicated(),
        (_t(_L + "self_attn.q_norm.weight", "head"),), when="qk_layernorm"),
    Row(_M + "self_attention.k_layernorm.weight", Replicated(),
        (_t(_L + "self_attn.k_norm.weight", "head"),), when="qk_layernorm"),
    Row(_M + "self_attention.linear_proj.weight", Split(1),
        (_t(_L + "self_attn.o_proj.weight", "hidden", "q"),)),
    Row(_M + "pre_mlp_layernorm.weight", Replicated(),
        (_t(_L + "post_attention_layernorm.weight", "hidden"),)),
    Row(_M + "mlp.linear_fc1.weight", GateUp(),
        (_t(_L + "mlp.gate_proj.weight", "ffn", "hidden"),
         _t(_L + "mlp.up_proj.weight", "ffn", "hidden"))),
    Row(_M + "mlp.linear_fc2.weight", Split(1),
        (_t(_L + "mlp.down_proj.weight", "hidden", "ffn"),)),
    Row("decoder.final_layernorm.weight", Replicated(), (_t("model.norm.weight", "hidden"),)),
    Row("output_layer.weight", Vocabulary(), (_t("lm_head.weight", "vocab", "hidden"),),
        when="untied"),
    REWARD_ROW,
)

_N = "gpt_neox.layers.{}."

# Its fused query_key_value has Megatron's own layout: per head the query, key and value rows.
GPT_NEOX = (
    Row("embedding.word_embeddings.weight", Vocabulary(),
        (_t("gpt_neox.embed_in.weight", "vocab", "hidden"),)),
    *(Row(f"{_M}input_layernorm.{part}", Replicated(),
          (_t(f"{_N}input_layernorm.{part}", "hidden"),)) for part in ("weight", "bias")),
    Row(_M + "self_attention.linear_qkv.weight", Split(0),
        (_t(_N + "attention.query_key_value.weight", "qkv", "hidden"),)),
    Row(_M + "self_attention.linear_qkv.bias", Split(0),
        (_t(_N + "attention.query_key_value.bias", "qkv"),)),
    Row(_M + "self_attention.linear_proj.weight", Split(1),
        (_t(_N + "attention.dense.weight", "hidden", "q"),)),
    Row(_M + "self_attention.linear_proj.bias", Replicated(),
        (_t(_N + "attention.dense.bias", "hidden"),)),
    *(Row(f"{_M}pre_mlp_layernorm.{part}", Replicated(),
          (_t(f"{_N}post_attention_layernorm.{part}", "hidden"),)) for part in ("weight", "bias")),
    Row(_M + "mlp.linear_fc1.weight", Split(0),
        (_t(_N + "mlp.dense_h_to_4h.weight", "ffn", "hidden"),)),
    Row(_M + "mlp.linear_fc1.bias", Split(0), (_t(_N + "mlp.dense_h_to_4h.bias", "ffn"),)),
    Row(_M + "mlp.linear_fc2.weight", Split(1),
        (_t(_N + "mlp.dense_4h_to_h.weight", "hidden", "ffn"),)),
    Row(_M + "mlp.linear_fc2.bias", Replicated(),
        (_t(_N + "mlp.dense_4h_to_h.bias", "hidden"),)),
    *(Row(f"decoder.final_layernorm.{part}", Replicated(),
          (_t(f"gpt_neox.final_layer_norm.{part}", "hidden"),)) for part in ("weight", "bias")),
    Row("output_layer.weight", Vocabulary(), (_t("embed_out.weight", "vocab", "hidden"),),
        when="untied"),
    REWARD_ROW,
)

# A family with other names or other parameters gets a table of its own.
FAMILIES: dict[str, tuple[Row, ...]] = {
    "LlamaForCausalLM": LLAMA_LIKE,
    "MistralForCausalLM": LLAMA_LIKE,
    "Qwen2ForCausalLM": LLAMA_LIKE,
    "Qwen3ForCausalLM": LLAMA_LIKE,
    "GPTNeoXForCausalLM": GPT_NEOX,
}

# Transformer Engine fuses each norm into the linear layer that follows it.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}

# Tensors that older versions of transformers saved and that hold no weights.
BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


def row_groups(arch: Architecture) -> Iterator[tuple[str, list[Row]]]:
    """(what it is, its rows) for the embedding, each layer and the head, in forward order."""
    table = [r for r in FAMILIES[arch.family] if _applies(r, arch)]
    single = [r for r in table if "{}" not in r.megatron]
    yield "embedding", [r for r in single if r.megatron == EMBEDDING]
    for layer in range(arch.transformer["num_layers"]):
        yield f"layer {layer}", [r.at(layer) for r in table if "{}" in r.megatron]
    yield "head", [r for r in single if r.megatron != EMBEDDING]


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
    (row,) = (row for row in FAMILIES[arch.family] if row.megatron == HEAD)
    return row.hf[0].name


def hf_tensors(row: Row, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
    """A row's HF tensors from all tensor-parallel shards; a vocabulary's padding is cut off."""
    whole = row.transform.write(shards, heads(arch))
    return [t[: hf.shape(arch)[0]] for t, hf in zip(whole, row.hf, strict=True)]


def heads(arch: Architecture) -> Heads:
    """What the attention transforms need to know."""
    return Heads(arch.transformer["num_query_groups"], arch.transformer["kv_channels"])


def _applies(row: Row, arch: Architecture) -> bool:
    if row.when is None:
        return True
    if row.when == "untied":
        return not arch.tie_word_embeddings and not arch.reward
    if row.when == "reward":
        return arch.reward
    return bool(arch.transformer.get(row.when))
