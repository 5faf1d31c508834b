"""Attention on a CPU whose numbers do not depend on how many hidden keys follow the seen ones.

MKL adds up a product over many terms in pieces, whose ends depend on how many there are: with
AVX-512 up to 384 in one piece. A request that attends beside a longer one, padded to its length,
would have other last bits than alone. So keys are taken in pieces that always end at the same
places, and the pieces are put together by their logarithmic sums of exponentials.

With a soft cap attention is two products and not a kernel, and what few rows give depends on how
their keys lie in memory too: as they were gathered for one request alone, a copy for several. So
they are given as one copy always, and very small products as larger ones.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_irl.hardware.softcap import attend, capped_scores

LANES = 16  # float32 numbers in a vector register of AVX-512, and a multiple of narrower ones
PIECE = 384  # keys
LEAST = 400  # numbers of a product that torch leaves to MKL; smaller ones it adds up itself
NOTHING = -1e30  # log of a sum of no exponentials; of -inf, differences would be NaN


def steady_attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False,
    scale: float | None, softcap: float,
) -> Tensor:
    """``attend`` without gradient, steady; on other devices it is ``attend`` itself.

    Args:
        q: [B, N, Q, D]; k, v: [B, K, S, D], N a multiple of K.
        mask: Additive, broadcast to [B, 1, Q, S]; 0 or -inf.
        causal: Without a mask: query i sees keys 0 to i.
        scale, softcap: As for ``attend``.
    """
    options: dict[str, Any] = {"scale": scale, "softcap": softcap}
    if q.device.type != "cpu":
        return attend(q, k, v, mask, causal=causal, **options)
    rows = q.shape[2]
    if softcap:
        q = _with_rows(q, -(-LEAST // (LANES * q.shape[3])))
    if k.shape[2] <= PIECE:
        keys, values = _copied(k, v) if softcap else (k, v)
        return attend(q, keys, values, mask, causal=causal, **options)[:, :, :rows]
    causal = causal and mask is None
    out = torch.zeros(q.shape, dtype=torch.float32)
    total = torch.full(q.shape[:3], NOTHING)  # log of the sum of exponentials so far
    for first in range(0, k.shape[2], PIECE):
        keys = slice(first, first + PIECE)
        queries = slice(first if causal else 0, None)  # those before see none of the keys
        if causal and first >= q.shape[2]:
            break
        here = None if mask is None else mask[..., keys]
        asking, given = q[:, :, queries], (k[:, :, keys], v[:, :, keys])
        if softcap:
            part, piece = _capped(asking, *_copied(*given), here, causal=causal, **options)
        else:
            part, piece = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                asking, *given, 0.0, causal, attn_mask=here, scale=scale
            )
            if here is not None:  # the kernel's sum is 0 for a query that sees nothing here
                piece = piece.masked_fill(~(here == 0).any(-1), NOTHING)
        before = total[:, :, queries]
        most = torch.maximum(before, piece)
        # Not ``logaddexp``: its last few elements are computed in another way than the others.
        old, new = (before - most).exp(), (piece - most).exp()
        both = old + new  # 1 and 0 where a side is empty, which leaves the other's bits alone
        out[:, :, queries] = (
            out[:, :, queries] * (old / both)[..., None] + part * (new / both)[..., None]
        )
        total[:, :, queries] = most + both.log()
    return out[:, :, :rows].to(q.dtype)


def _with_rows(q: Tensor, least: int) -> Tensor:
    """[B, N, Q, D] with rows of zeros behind the others, where these are fewer."""
    return F.pad(q, (0, 0, 0, max(0, least - q.shape[2])))


def _copied(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same values as a product of several requests copies them before it begins."""
    return k.transpose(-1, -2).contiguous().transpose(-1, -2), v.contiguous()


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """As the kernel: attention to these keys, and the log of its sum of exponentials [B, N, Q]."""
    scores = capped_scores(q, k, mask, causal=causal, scale=scale, softcap=softcap)
    scores = scores.clamp_(min=NOTHING)  # a query may see nothing here
    weights = scores.softmax(-1)
    # Not ``logsumexp``, which adds up in another order than softmax: the largest weight is 1 / sum.
    total = scores.amax(-1) - weights.amax(-1).log()
    return (weights.to(v.dtype) @ v[:, :, None]).flatten(1, 2), total.flatten(1, 2)
