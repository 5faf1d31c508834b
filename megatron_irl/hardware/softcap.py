"""Soft caps: x → cap tanh(x / cap), on attention scores. No fused kernel at hand has them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cap(values: Tensor, cap: float) -> Tensor:
    """Cap tanh(values / cap), elementwise."""
    return torch.tanh(values / cap) * cap


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float | None, cap: float,
    *, dropout: float = 0.0,
) -> Tensor:
    """Attention whose scaled scores are capped before the softmax.

    The scores exist as a whole, in fp32: memory grows with the square of the length.

    Args:
        q: [B, N, Q, D]; k, v: [B, K, S, D], N a multiple of K: query heads in groups of N / K.
        hidden: bool, broadcast to [B, 1, Q, S]: keys a query does not see; None: it sees all. A
            query that sees none gets an arbitrary finite result.
        scale: Of the scores; None: D ** -0.5.
        dropout: Share of the attention weights to drop.

    Returns:
        [B, N, Q, D]. Gradient to q, k and v.
    """
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, N / K, Q, D]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = soft_cap((grouped @ k[:, :, None].transpose(-1, -2)).float() * scale, cap)
    if hidden is not None:
        mask = hidden if hidden.dim() == 2 else hidden[:, :, None]
        # The smallest number and not -inf: a row of nothing but -inf would be NaN.
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0).to(v.dtype)
    return (weights @ v[:, :, None]).flatten(1, 2)
