"""Soft caps: x → cap tanh(x / cap), on attention scores. No fused kernel at hand has them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cap(values: Tensor, cap: float) -> Tensor:
    """Cap tanh(values / cap), elementwise."""
    return torch.tanh(values / cap) * cap


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False,
    scale: float | None, softcap: float | None, dropout: float = 0.0,
) -> Tensor:
    """``scaled_dot_product_attention``, or where there is a cap the same written out with it.

    Written out, the scores exist as a whole, in fp32: memory grows with the square of the length.

    Args:
        q: [B, N, Q, D]; k, v: [B, K, S, D], N a multiple of K: query heads in groups of N / K.
        mask: Broadcast to [B, 1, Q, S]; bool, True where a query sees a key, or to be added.
        causal: Without a mask: query i sees keys 0 to i.
        scale: Of the scores; None: D ** -0.5.
        softcap: Of the scaled scores; None or 0: no cap.
        dropout: Share of the attention weights to drop.

    Returns:
        [B, N, Q, D]. Gradient to q, k and v.
    """
    if not softcap:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale,
            dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1],
        )
    scores = capped_scores(q, k, mask, causal=causal, scale=scale, softcap=softcap)
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0).to(v.dtype)
    return (weights @ v[:, :, None]).flatten(1, 2)


def capped_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None,
    softcap: float,
) -> Tensor:
    """float32 [B, K, N / K, Q, S], -inf where a query does not see a key; arguments as above."""
    if causal and mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril_()
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, N / K, Q, D]
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    # Capped and summed in fp32 whatever the inputs are, as the fused kernels do inside.
    scores = soft_cap((grouped @ k[:, :, None].transpose(-1, -2)).float() * factor, softcap)
    if mask is None:
        return scores
    shaped: Tensor = mask if mask.dim() == 2 else mask[:, :, None]
    if shaped.dtype == torch.bool:
        return scores.masked_fill(~shaped, float("-inf"))
    return scores + shaped
