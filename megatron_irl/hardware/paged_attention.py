"""Paged attention over ``scaled_dot_product_attention``, for fp32 and where flash-attn is missing.

Megatron-Core's dynamic engine calls two flash-attn kernels on a paged KV cache. These stand in
for them (``compat.attention_kernels`` puts them there), batched over requests. Three things make
them fast on CPU: indices and masks are built once per engine step, not once per layer; keys are
trimmed to the longest live request; and when every request lives in one block, decode reads the
cache in place instead of gathering it.

What a request attends to, capped or not, does not depend on who shares the step with it, to the
last bit, where keys come in multiples of ``LANES``: sums over keys are kept a vector register wide,
and hidden keys then add zeros to whole registers. A ragged end would be added up in another order,
and where it is, is the longest request's doing. Many keys are taken in pieces
(``steady_attention``). (So measured for AVX-512; for AVX2 up to 192 tokens.)

Shape letters: B requests, T packed query tokens, S key positions, N query heads, K key heads,
G = N / K, D head size, L block length in tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_irl.hardware.steady_attention import LANES, steady_attend

FULL_ATTENTION = (-1, -1)


@dataclass(frozen=True)
class _Decode:
    """Where the keys of B one-token queries are, for one engine step.

    ``view`` is a range of cache blocks read in place; ``rows`` then says which query goes to which
    block of the range and ``slots`` the way back. Otherwise ``blocks`` are gathered.
    """

    longest: int
    mask: Tensor | None  # additive, [B or blocks in view, 1, 1, S]
    view: slice | None
    rows: Tensor | None
    slots: Tensor | None
    blocks: Tensor | None  # [B, blocks per request]


@dataclass(frozen=True)
class _Prefill:
    """Requests of similar length, laid out as one right-padded batch."""

    tokens: Tensor  # [b, longest query] into T
    scatter: tuple[Tensor, Tensor]  # (flat index into the batch, index into T) of real tokens
    blocks: Tensor  # [b, blocks per request]
    longest: int  # keys
    mask: Tensor | None  # additive, [b, 1, Q, S]; None when plain causal masking is right


@dataclass(frozen=True)
class _Mixed:
    decode: tuple[Tensor, _Decode] | None
    prefill: tuple[_Prefill, ...]


class _LastStep:
    """Remembers the layouts of the last step, compared by content: layers ask for the same.

    There are as many layouts in a step as kinds of layers: two where only some have a window.
    """

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build
        self._known: dict[tuple[Any, ...], tuple[tuple[Tensor, ...], Any]] = {}

    def __call__(self, tensors: tuple[Tensor, ...], *rest: Any) -> Any:
        old, value = self._known.get(rest, ((), None))
        if not old or not all(map(_equal, old, tensors)):
            value = self._build(*tensors, *rest)
            self._known[rest] = (tuple(t.clone() for t in tensors), value)
        return value


def _equal(a: Tensor, b: Tensor) -> bool:
    # On CUDA the host waits here once a layer, and for layouts: hence no graphs of such decoding.
    return a.shape == b.shape and torch.equal(a, b)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = FULL_ATTENTION,
    softcap: float = 0.0,
    return_softmax_lse: bool = False,
    num_splits: int = 0,
) -> Tensor:
    """One new token per request against its cached keys, which include the token itself.

    Shapes: q [B, 1, N, D]; k_cache, v_cache [blocks, L, K, D], finite everywhere; cache_seqlens
    int32 [B], 0 for padding rows; block_table int32 [B, blocks], -1 where unused. The other
    arguments are flash-attn's.

    Returns:
        [B, 1, N, D]; rows of length 0 hold arbitrary finite numbers. No gradient.

    Raises:
        NotImplementedError: Attention sinks, several tokens per request.
    """
    del causal, num_splits
    window = _window(window_size, return_softmax_lse)
    if q.shape[1] != 1:
        raise NotImplementedError("speculative decoding needs flash-attn")
    layout = _decode_layout((cache_seqlens, block_table), k_cache.shape[1], q.dtype, window)
    return _decode(q[:, 0], k_cache, v_cache, layout, softmax_scale, softcap)[:, None]


def flash_attn_varlen_func(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_table: Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = FULL_ATTENTION,
    softcap: float = 0.0,
    return_attn_probs: bool = False,
) -> Tensor:
    """Packed queries (new prompts, continued prompts and single tokens mixed), cached keys.

    Shapes: q [T, N, D], where rows past ``cu_seqlens_q[-1]`` are padding; the caches and the block
    table as above; cu_seqlens_q, cu_seqlens_k int32 [B + 1]. Causal: the last query of a request
    is aligned with its last key.

    Returns:
        [T, N, D], zero in padding rows. No gradient.

    Raises:
        NotImplementedError: Attention sinks.
    """
    del causal, max_seqlen_q, max_seqlen_k
    window = _window(window_size, return_attn_probs)
    layout = _mixed_layout(
        (cu_seqlens_q, cu_seqlens_k, block_table), k_cache.shape[1], q.dtype, window
    )
    out = torch.zeros_like(q)
    if layout.decode is not None:
        tokens, decode = layout.decode
        out[tokens] = _decode(q[tokens], k_cache, v_cache, decode, softmax_scale, softcap)
    for group in layout.prefill:
        keys, values = (_gather(c, group.blocks, group.longest) for c in (k_cache, v_cache))
        part = steady_attend(
            q[group.tokens].transpose(1, 2), keys, values, group.mask, causal=True,
            scale=softmax_scale, softcap=softcap,
        )
        source, target = group.scatter
        out[target] = part.transpose(1, 2).flatten(0, 1)[source]
    return out


def _window(window_size: tuple[int, int], wants_lse: bool) -> int | None:
    """Keys a query sees, itself included; None: all before it."""
    if wants_lse:
        raise NotImplementedError("generation with attention sinks needs flash-attn")
    return None if window_size[0] < 0 else window_size[0] + 1


def _decode(
    q_BND: Tensor, k_cache: Tensor, v_cache: Tensor, layout: _Decode, scale: float | None,
    softcap: float = 0.0,
) -> Tensor:
    """[B, N, D] → [B, N, D]. The G queries that share a key head become G query positions."""
    q = q_BND.unflatten(1, (k_cache.shape[2], -1))
    if layout.view is not None:
        assert layout.rows is not None and layout.slots is not None
        keys, values = (
            c[layout.view, : layout.longest].transpose(1, 2) for c in (k_cache, v_cache)
        )
        q = q.index_select(0, layout.rows)
    else:
        assert layout.blocks is not None
        keys, values = (_gather(c, layout.blocks, layout.longest) for c in (k_cache, v_cache))
    out = steady_attend(q, keys, values, layout.mask, scale=scale, softcap=softcap)
    if layout.slots is not None:
        out = out.index_select(0, layout.slots)
    return out.flatten(1, 2)


def _gather(cache: Tensor, blocks: Tensor, longest: int) -> Tensor:
    """[blocks, L, K, D] → [b, K, longest, D] for the block ids [b, n]."""
    if blocks.shape[1] == 1:
        return cache[:, :longest].index_select(0, blocks[:, 0]).transpose(1, 2)
    rows = cache.index_select(0, blocks.flatten()).unflatten(0, blocks.shape)
    return rows.flatten(1, 2)[:, :longest].transpose(1, 2)


def _whole_registers(longest: int, block_table: Tensor, block_length: int) -> int:
    """Keys to attend to: a multiple of ``LANES``, as far as the blocks of a request reach."""
    return min(_in_lanes(longest), block_table.shape[1] * block_length)


def _in_lanes(count: int) -> int:
    return -(-count // LANES) * LANES


def _visible(
    lengths: Tensor, longest: int, dtype: torch.dtype, window: int | None
) -> Tensor | None:
    """Additive mask [n, 1, 1, longest], or None when every row sees all of it."""
    places = torch.arange(longest, device=lengths.device)
    hidden = places >= lengths[:, None]
    if window is not None:
        hidden |= places < lengths[:, None] - window
    if not bool(hidden.any()):
        return None
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    return zeros.masked_fill_(hidden, float("-inf"))[:, None, None]


def _build_decode(
    lengths: Tensor, block_table: Tensor, block_length: int, dtype: torch.dtype,
    window: int | None = None,
) -> _Decode:
    lengths = lengths.long()
    longest = _whole_registers(max(1, int(lengths.max())), block_table, block_length)
    per_request = -(-longest // block_length)
    blocks = block_table[:, :per_request].long().clamp_(min=0)
    lengths_or_1 = lengths.clamp(min=1)  # a fully masked row would be NaN
    live = lengths > 0
    if per_request == 1 and bool(live.any()):
        first, last = int(blocks[live].min()), int(blocks[live].max())
        span = last - first + 1
        # Reading idle blocks in between costs less than copying, up to about this ratio.
        if span <= 1.3 * int(live.sum()):
            slots = torch.where(live, blocks[:, 0] - first, 0)
            rows = torch.zeros(span, dtype=torch.long, device=lengths.device)
            spans = torch.ones(span, dtype=torch.long, device=lengths.device)
            rows[slots[live]] = live.nonzero()[:, 0]
            spans[slots[live]] = lengths[live]
            mask = _visible(spans, longest, dtype, window)
            return _Decode(longest, mask, slice(first, last + 1), rows, slots, None)
    mask = _visible(lengths_or_1, longest, dtype, window)
    return _Decode(longest, mask, None, None, None, blocks)


def _build_mixed(
    cu_q: Tensor, cu_k: Tensor, block_table: Tensor, block_length: int, dtype: torch.dtype,
    window: int | None = None,
) -> _Mixed:
    queries, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
    single = [i for i, n in enumerate(queries) if n == 1]
    decode = None
    if single:
        index = torch.tensor(single, device=cu_q.device)
        lengths = cu_k.diff()[index]
        layout = _build_decode(lengths, block_table[index], block_length, dtype, window)
        decode = (cu_q.long()[index], layout)
    prompts = sorted((i for i, n in enumerate(queries) if n > 1), key=lambda i: -keys[i])
    groups: list[list[int]] = []
    for request in prompts:
        # Padding at most doubles the work of any request.
        if not groups or 2 * keys[request] < keys[groups[-1][0]]:
            groups.append([])
        groups[-1].append(request)
    prefill = tuple(
        _build_prefill(group, cu_q, queries, keys, block_table, block_length, dtype, window)
        for group in groups
    )
    return _Mixed(decode, prefill)


def _build_prefill(
    group: list[int], cu_q: Tensor, queries: list[int], keys: list[int], block_table: Tensor,
    block_length: int, dtype: torch.dtype, window: int | None,
) -> _Prefill:
    device = cu_q.device
    index = torch.tensor(group, device=device)
    n_queries = torch.tensor([queries[i] for i in group], device=device)
    n_keys = torch.tensor([keys[i] for i in group], device=device)
    starts = cu_q.long()[index]
    longest = _whole_registers(max(keys[i] for i in group), block_table, block_length)
    # Queries too, since a lone last one would be multiplied by another routine.
    padded = _in_lanes(max(queries[i] for i in group))
    offsets = torch.arange(padded, device=device)
    real = offsets < n_queries[:, None]
    tokens = torch.where(real, starts[:, None] + offsets, starts[:, None])
    mask = None
    narrow = window is not None and window < longest
    # A cached prefix: ends are aligned, not beginnings.
    if narrow or any(queries[i] != keys[i] for i in group):
        last_visible = ((n_keys - n_queries)[:, None] + offsets)[..., None]  # [b, Q, 1]
        places = torch.arange(longest, device=device)
        hidden = places > last_visible
        if window is not None:
            hidden |= places <= last_visible - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        mask = mask.masked_fill_(hidden, float("-inf"))[:, None]
    per_request = -(-longest // block_length)
    blocks = block_table[index, :per_request].long().clamp_(min=0)
    return _Prefill(tokens, (real.flatten().nonzero()[:, 0], tokens[real]), blocks, longest, mask)


_decode_layout = _LastStep(_build_decode)
_mixed_layout = _LastStep(_build_mixed)


def has_flash_attention() -> bool:
    """Whether generation in 16 bits runs on flash-attn (2, 3 or 4), and not on the stand-ins."""
    from megatron.core.transformer import attention

    ours = (None, flash_attn_with_kvcache)
    found = attention.HAVE_FA4 or attention.HAVE_FA3
    return bool(found) or attention.flash_attn_with_kvcache not in ours
