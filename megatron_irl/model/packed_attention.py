"""Self-attention over packed sequences for the spec used without Transformer Engine.

Megatron-Core's own local attention knows no packed sequences and builds its scores in fp32 for
the whole row. Shape letters: T packed tokens, B sequences of the pack, S the longest of them,
N query heads, K key heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.hardware.softcap import attend

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip
from megatron.core.transformer.utils import is_layer_window_attention  # isort: skip

# On CPU torch's fused attention is slower than plain matrix products for sequences this short
# (docs/log.md). Longer ones also have more scores than are worth keeping for the backward pass.
SHORT = {torch.float32: 128, torch.bfloat16: 256}


class PackedAttention(nn.Module):
    """Causal self-attention over packed sequences, each within itself.

    With ``softcap`` the scaled scores are capped at it before the softmax.

    Sequences are laid out as one right-padded batch: with a causal mask a padded key is only ever
    visible to padded queries, so no mask is built for the padding.
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
        *,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        del attn_mask_type, attention_type, cp_comm_type, pg_collection
        skip: Any = config.window_attn_skip_freq
        windowed = is_layer_window_attention(config.window_size, skip, layer_number)
        self.window = config.window_size[0] + 1 if windowed and config.window_size else None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale
        self.softcap = softcap

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
        """Attend. Packed: q [T, N, D], k/v [T, K, D]; otherwise [S, B, ..]. Returns [.., N * D]."""
        del attention_mask, attn_mask_type
        assert attention_bias is None, "attention bias has no path here"
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        layout = packed_seq_params.padded_layout  # set by model.forward, once per microbatch
        if layout is None:
            q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
            return self._attend(q, k, v)[0].transpose(0, 1).flatten(1)
        gather_BS, scatter_T = layout
        q, k, v = (
            _Pad.apply(x, gather_BS, scatter_T).transpose(1, 2) for x in (query, key, value)
        )
        out = self._attend(q, k, v).transpose(1, 2)
        return _Unpad.apply(out, scatter_T).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N or K, S, D] → [B, N, S, D]."""
        dropout = self.dropout if self.training else 0.0
        length = q.shape[2]
        if self.softcap is not None:
            return attend(
                q, k, v, self._visible(length, q.device), scale=self.scale, softcap=self.softcap,
                dropout=dropout,
            )
        if q.is_cpu and length <= SHORT.get(q.dtype, 0) and dropout == 0.0:
            return _attend_short(q, k, v, self._visible(length, q.device), self.scale)
        mask = None
        if self.window is not None and self.window < length:
            mask = self._visible(length, q.device)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def _visible(self, length: int, device: torch.device) -> Tensor:
        """Bool [S, S]: the keys a query sees; itself and what is before it, in its window."""
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
        return mask if self.window is None else mask.triu_(1 - self.window)


def _attend_short(
    q: Tensor, k: Tensor, v: Tensor, visible_SS: Tensor, scale: float | None
) -> Tensor:
    """Attention by two batched products; the queries that share a key head form one matrix."""
    batch, key_heads, length, size = k.shape
    hidden = torch.zeros(length, length, dtype=q.dtype).masked_fill_(~visible_SS, float("-inf"))
    group = q.shape[1] // key_heads
    queries = q.reshape(batch * key_heads, group * length, size)
    keys, values = (x.reshape(batch * key_heads, length, size) for x in (k, v))
    scores = torch.baddbmm(
        hidden.repeat(group, 1).expand(batch * key_heads, -1, -1), queries,
        keys.transpose(1, 2), alpha=size**-0.5 if scale is None else scale,
    )
    return torch.bmm(scores.softmax(-1), values).view(q.shape)


class _Pad(torch.autograd.Function):
    """[T, heads, D] → [B, S, heads, D].

    A padded slot holds a copy that no real query sees, so its gradient is zero and the backward
    pass is a plain selection; autograd's own would scatter and add.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather_BS: Tensor, scatter_T: Tensor) -> Tensor:
        ctx.save_for_backward(scatter_T)
        return x.index_select(0, gather_BS.flatten()).unflatten(0, gather_BS.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scatter_T,) = ctx.saved_tensors
        return grads[0].flatten(0, 1).index_select(0, scatter_T), None, None


class _Unpad(torch.autograd.Function):
    """[B, S, heads, D] → [T, heads, D]; the gradient of padded slots is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter_T: Tensor) -> Tensor:
        ctx.save_for_backward(scatter_T)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, scatter_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scatter_T,) = ctx.saved_tensors
        # ``index_copy``: no slot comes twice, so nothing is added and the order is no matter.
        grad = grads[0].new_zeros(ctx.shape)
        grad.flatten(0, 1).index_copy_(0, scatter_T, grads[0])
        return grad, None


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
    # A wait for the device on CUDA, as the selection below is: once a microbatch, not once a layer.
    longest = int(lengths.max())
    offsets = torch.arange(longest, device=device)
    inside = offsets < lengths[:, None]
    gather = torch.where(inside, starts[:, None] + offsets, starts[:, None])
    scatter = torch.arange(len(starts) * longest, device=device).view_as(gather)[inside]
    return gather, scatter
