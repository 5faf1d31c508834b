"""Attention on a CPU whose numbers do not depend on how many hidden keys follow the seen ones.

MKL adds up a product over many terms in pieces, whose ends depend on how many there are: with
AVX-512 up to 384 in one piece. A request that attends beside a longer one, padded to its length,
would have other last bits than alone. So keys are taken in pieces that always end at the same
places, and the pieces are put together by their logarithmic sums of exponentials.
"""

import torch
from torch import Tensor

from megatron_irl.hardware.softcap import attend

PIECE = 384  # keys
NOTHING = -1e30  # log of a sum of no exponentials; of -inf, differences would be NaN


def steady_attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False,
    scale: float | None, softcap: float,
) -> Tensor:
    """``attend``, steady where there are more than ``PIECE`` keys; without gradient.

    On other devices, and with a soft cap, it is ``attend`` itself.

    Args:
        q: [B, N, Q, D]; k, v: [B, K, S, D], N a multiple of K.
        mask: Additive, broadcast to [B, 1, Q, S]; 0 or -inf.
        causal: Without a mask: query i sees keys 0 to i.
        scale, softcap: As for ``attend``.
    """
    if k.shape[2] <= PIECE or softcap or q.device.type != "cpu":
        return attend(q, k, v, mask, causal=causal, scale=scale, softcap=softcap)
    causal = causal and mask is None
    out = torch.zeros(q.shape, dtype=torch.float32)
    total = torch.full(q.shape[:3], NOTHING)  # log of the sum of exponentials so far
    for first in range(0, k.shape[2], PIECE):
        keys = slice(first, first + PIECE)
        queries = slice(first if causal else 0, None)  # those before see none of the keys
        if causal and first >= q.shape[2]:
            break
        here = None if mask is None else mask[..., keys]
        part, piece = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, attn_mask=here,
            scale=scale,
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
    return out.to(q.dtype)
