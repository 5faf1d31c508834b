"""Variable-length sequences to packed microbatches, and items to balanced microbatches."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from megatron_irl.types import PackedBatch

TokenIds = Sequence[int] | np.ndarray

# Tokens a GEMM needs to come in: 16 for cuBLAS FP8, a scaling block for the block recipes.
FP8_ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


def pack(
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    ref_logps: Sequence[float] | None,
    *,
    multiple_of: int = 1,
    pad_id: int = 0,
    sampled_logprobs: Sequence[np.ndarray] | None = None,
    advantages: Sequence[float] | None = None,
    loss_masks: Sequence[np.ndarray | None] | None = None,
    is_preference: bool = False,
) -> PackedBatch:
    """Lay (prompt ids, response ids) sequences end to end in one row.

    For a sequence that starts at o with a prompt of p tokens, response token j is predicted from
    row o + p + j - 1: exactly the response is counted, EOS included, and nothing of the prompt.
    Masking is by length; token ids play no part, so pad and EOS may be the same id. Where a
    response has a mask, only the tokens it marks have a row.

    Args:
        sequences: [S] (prompt ids, response ids).
        ref_logps: [S] cached reference log-probabilities in nats, or None for zeros.
        multiple_of: T is padded up to a multiple of this with one more segment, which no row
            belongs to.
        pad_id: What that segment is filled with.
        sampled_logprobs: [S] float32 arrays as long as the responses, and
        advantages: [S]; for policy steps only.
        loss_masks: [S] bool arrays as long as the responses, or None for all of a response; not
            together with ``sampled_logprobs``.
        is_preference: Passed on to the batch.

    Raises:
        ValueError: No sequence, an empty prompt (nothing would predict the first response
            token), an empty response or one with nothing marked, or ref_logps of another length.
    """
    prompt_S = np.array([len(prompt) for prompt, _ in sequences], dtype=np.int64)
    response_S = np.array([len(response) for _, response in sequences], dtype=np.int64)
    if not sequences or not prompt_S.all() or not response_S.all():
        raise ValueError(f"prompt lengths {prompt_S.tolist()} and response lengths "
                         f"{response_S.tolist()} must all be positive, and there must be some")
    if ref_logps is not None and len(ref_logps) != len(sequences):
        raise ValueError(f"{len(ref_logps)} ref_logps for {len(sequences)} sequences")
    if sampled_logprobs is not None and list(map(len, sampled_logprobs)) != response_S.tolist():
        raise ValueError(f"sampled_logprobs of lengths {list(map(len, sampled_logprobs))} for "
                         f"responses of {response_S.tolist()} tokens")
    segment_lengths = prompt_S + response_S
    num_tokens = int(segment_lengths.sum())
    num_padding = -num_tokens % multiple_of
    parts = [np.asarray(ids, dtype=np.int64) for sequence in sequences for ids in sequence]
    if num_padding:  # a sequence of its own, so that no real token sees it or is seen by it
        parts.append(np.full(num_padding, pad_id, dtype=np.int64))
        segment_lengths = np.append(segment_lengths, num_padding)
    tokens_T = np.concatenate(parts)
    cu_seqlens = np.concatenate([[0], np.cumsum(segment_lengths)])
    starts = cu_seqlens[:-1]
    rows_R = _ranges(starts[: len(sequences)] + prompt_S - 1, response_S)
    segment_R, counted_S = np.repeat(np.arange(len(sequences)), response_S), response_S
    if loss_masks is not None and any(mask is not None for mask in loss_masks):
        mask_R = _joined_masks(loss_masks, response_S)
        rows_R, segment_R = rows_R[mask_R], segment_R[mask_R]
        counted_S = np.bincount(segment_R, minlength=len(sequences))
    ref = np.zeros(len(sequences)) if ref_logps is None else np.asarray(ref_logps)
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens_T)[None],
        position_ids_T=torch.from_numpy(_ranges(np.zeros_like(starts), segment_lengths))[None],
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(segment_lengths.max()),  # on the host: attention would wait to read it
        rows_R=torch.from_numpy(rows_R),
        targets_R=torch.from_numpy(tokens_T[rows_R + 1]),
        segment_R=torch.from_numpy(segment_R),
        num_sequences=len(sequences),
        lengths_S=torch.from_numpy(counted_S),
        ref_logps_S=torch.from_numpy(ref.astype(np.float32)),
        final_S=torch.from_numpy(starts[: len(sequences)] + prompt_S + response_S - 1),
        sampled_logprobs_R=None if sampled_logprobs is None else torch.from_numpy(
            np.concatenate(sampled_logprobs).astype(np.float32)),
        advantages_S=None if advantages is None else torch.tensor(
            advantages, dtype=torch.float32),
        is_preference=is_preference,
    )


def _joined_masks(masks: Sequence[np.ndarray | None], response_S: np.ndarray) -> np.ndarray:
    """Bool [sum of response_S], True for the tokens that are learnt."""
    parts = [np.ones(length, bool) if mask is None else np.asarray(mask, bool)
             for mask, length in zip(masks, response_S, strict=True)]
    if [len(part) for part in parts] != response_S.tolist() or not all(p.any() for p in parts):
        raise ValueError(f"loss_masks of {[len(part) for part in parts]} tokens, "
                         f"{[int(part.sum()) for part in parts]} of them marked, for responses of "
                         f"{response_S.tolist()} tokens")
    return np.concatenate(parts)


def lengthen(batch: PackedBatch, num_tokens: int) -> PackedBatch:
    """Return the pack with its masked padding segment made or grown so that T is ``num_tokens``."""
    missing = num_tokens - batch.tokens_T.shape[1]
    if missing < 0:
        raise ValueError(f"a pack of {batch.tokens_T.shape[1]} tokens is over {num_tokens}")
    if missing == 0:
        return batch
    bounds = batch.cu_seqlens[: batch.num_sequences + 1]
    num_kept = int(bounds[-1])
    padding = num_tokens - num_kept
    return replace(
        batch,
        tokens_T=F.pad(batch.tokens_T, (0, missing)),
        position_ids_T=torch.cat(
            [batch.position_ids_T[:, :num_kept], torch.arange(padding)[None]], dim=1
        ),
        cu_seqlens=torch.cat([bounds, bounds.new_tensor([num_tokens])]),
        max_seqlen=max(batch.max_seqlen, padding),
    )


def assign(lengths: Sequence[int], num_bins: int, per_bin: int) -> list[list[int]]:
    """Split the items of a global batch into equally many per microbatch, equally long.

    Greedy: the longest item left goes to the microbatch that has the fewest tokens so far and
    still has room. Deterministic, so every rank computes the same split.

    Args:
        lengths: Tokens of each item; a pair counts demonstration and sample, prompts included.
        num_bins: Microbatches, over all data-parallel ranks.
        per_bin: Items in each of them.

    Returns:
        [num_bins][per_bin] positions in ``lengths``, ascending within each microbatch.

    Raises:
        ValueError: There are not num_bins * per_bin items.
    """
    if len(lengths) != num_bins * per_bin:
        raise ValueError(f"{len(lengths)} items do not fill num_bins={num_bins} microbatches "
                         f"of per_bin={per_bin}")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [(0, index) for index in range(num_bins)]  # a heap of (tokens, bin)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, index = heapq.heappop(room)
        bins[index].append(item)
        if len(bins[index]) < per_bin:
            heapq.heappush(room, (tokens + int(lengths[item]), index))
    return [sorted(items) for items in bins]


def assign_by_tokens(
    lengths: Sequence[int], max_tokens: int, num_bins_multiple_of: int
) -> list[list[int]]:
    """Split the items of a global batch into few microbatches of about equally many tokens.

    As few as hold at most ``max_tokens`` each, where the greedy split finds them: the longest item
    left goes to the microbatch that has the fewest tokens so far. Deterministic, so every rank
    computes the same split.

    Args:
        lengths: Tokens of each item, all positive.
        max_tokens: Of a microbatch; an item that is longer has one of its own.
        num_bins_multiple_of: The number of microbatches, over all data-parallel ranks, is a
            multiple of this.

    Returns:
        [microbatches][items] positions in ``lengths``, ascending within each, none empty.

    Raises:
        ValueError: The items are no multiple of ``num_bins_multiple_of``.
    """
    unit = num_bins_multiple_of
    if not len(lengths) or len(lengths) % unit:
        raise ValueError(f"{len(lengths)} items are no multiple of {unit}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    least = math.ceil(math.ceil(int(sum(lengths)) / max_tokens) / unit) * unit
    bins: list[list[int]] = []
    # With as many bins as items each item has its own, so the search ends well.
    for count in range(min(least, len(lengths)), len(lengths) + 1, unit):
        bins = [[] for _ in range(count)]
        room = [(0, index) for index in range(count)]  # a heap of (tokens, bin)
        for item in order:
            tokens, index = heapq.heappop(room)
            bins[index].append(item)
            heapq.heappush(room, (tokens + int(lengths[item]), index))
        if all(tokens <= max_tokens or len(bins[index]) == 1 for tokens, index in room):
            break
    return [sorted(items) for items in bins]


def alignment(
    tensor_model_parallel_size: int = 1,
    sequence_parallel: bool = False,
    context_parallel_size: int = 1,
    fp8_recipe: str | None = None,
) -> int:
    """Return what T of a packed microbatch must be a multiple of; the one place that knows.

    - Sequence parallelism splits T over the tensor ranks: a multiple of their number.
    - FP8 GEMMs see the tokens of one rank: 16 (``delayed``, ``tensorwise``), 32 (``mxfp8``) or
      128 (``blockwise``) for each rank T is split over.
    - Context parallelism gives every rank two of 2 * context_parallel_size equal pieces. That
      holds for each *sequence*, which ``pack`` does not pad: only the factor for T is here.

    Raises:
        ValueError: Unknown fp8_recipe.
    """
    if fp8_recipe is not None and fp8_recipe not in FP8_ALIGNMENT:
        raise ValueError(f"fp8_recipe={fp8_recipe} is none of {', '.join(FP8_ALIGNMENT)}")
    unit = 1 if fp8_recipe is None else FP8_ALIGNMENT[fp8_recipe]
    shards = tensor_model_parallel_size if sequence_parallel else 1
    pieces = 2 * context_parallel_size if context_parallel_size > 1 else 1
    return unit * shards * pieces


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate ``arange(start, start + length)``; int64 [sum of lengths]."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum(), dtype=np.int64)
