"""Layers of the spec used without Transformer Engine: packed SDPA attention, norm, rotary.

Megatron-Core's own local spec materialises attention scores, knows no packed sequences, and
refuses sequence parallelism in its norm. These three modules fill exactly those gaps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_irl import platform  # noqa: F401  (must precede megatron)

from megatron.core.models.common.embeddings import RotaryEmbedding  # isort: skip
from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip
from megatron.core.transformer.utils import is_layer_window_attention  # isort: skip


class PackedSdpaAttention(nn.Module):
    """Causal self-attention over packed sequences by ``scaled_dot_product_attention``.

    Sequences of a pack attend within themselves. They are laid out as one right-padded batch:
    with a causal mask a padded key is only ever visible to padded queries, so no mask is built
    unless a sliding window is shorter than the sequences.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        del attn_mask_type, attention_type, cp_comm_type, pg_collection
        skip: Any = config.window_attn_skip_freq
        windowed = is_layer_window_attention(config.window_size, skip, layer_number)
        self.window = config.window_size[0] + 1 if windowed and config.window_size else None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend. Packed: q [T, n, d], k/v [T, g, d]; otherwise [s, b, n, d]. Returns [.., n*d]."""
        del attention_mask, attn_mask_type
        assert attention_bias is None, "attention bias has no SDPA path here"
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        layout = packed_seq_params.padded_layout  # set by model.forward, once per microbatch
        if layout is None:
            q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
            return self._attend(q, k, v)[0].transpose(0, 1).flatten(1)
        gather_BS, scatter_T = layout
        batch, longest = gather_BS.shape
        q, k, v = (
            x.index_select(0, gather_BS.flatten()).unflatten(0, (batch, longest)).transpose(1, 2)
            for x in (query, key, value)
        )
        out = self._attend(q, k, v).transpose(1, 2).flatten(0, 1)
        return out.index_select(0, scatter_T).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        grouped = q.shape[1] != k.shape[1]
        mask, length = None, q.shape[2]
        if self.window is not None and self.window < length:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril_()
            mask = mask.triu_(1 - self.window)  # a token sees itself and window - 1 before it
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, dropout_p=dropout,
            enable_gqa=grouped,
        )


def padded_layout(cu_seqlens: list[int], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Indices that turn a pack [T] into a right-padded batch [B, S] and back.

    Returns:
        ``(gather_BS, scatter_T)`` int64, or None for a single sequence, which needs neither.
        Padded slots repeat their sequence's first token; causality keeps them invisible.
    """
    starts = torch.tensor(cu_seqlens[:-1], device=device)
    lengths = torch.tensor(cu_seqlens[1:], device=device) - starts
    if len(starts) == 1:
        return None
    longest = int(lengths.max())
    offsets = torch.arange(longest, device=device)
    inside = offsets < lengths[:, None]
    gather = torch.where(inside, starts[:, None] + offsets, starts[:, None])
    scatter = torch.arange(len(starts) * longest, device=device).view_as(gather)[inside]
    return gather, scatter


class LocalNorm(nn.Module):
    """RMSNorm or LayerNorm whose weights are marked for sequence parallelism.

    The mark makes Megatron sum the weight gradient over the tensor-parallel group, since each
    rank sees only its slice of the sequence.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> nn.Module:
        kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class PackedRotaryEmbedding(RotaryEmbedding):
    """Rotary angles laid out per packed token, so that RoPE is one operation per layer.

    Upstream applies RoPE to a pack one sequence at a time, with the angles recomputed for each.
    When the angles are already one per token it applies them at once; ``positions_T`` (set per
    microbatch by ``model.forward``) provides them.
    """

    positions_T: Tensor | None = None

    def forward(  # pyright: ignore[reportIncompatibleVariableOverride]  (upstream caches it)
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> Tensor:
        """Angles [T, 1, 1, d] of a pack, or [max_seq_len, 1, 1, d] otherwise."""
        if packed_seq and self.positions_T is not None:
            return self.get_emb(max_seq_len).index_select(0, self.positions_T)
        return super().forward(max_seq_len, offset, packed_seq, cp_group)
