"""Variable-length sequences to packed microbatches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_irl.types import PackedBatch, SharedPrompts

TokenIds = Sequence[int] | np.ndarray

# Tokens a GEMM needs to come in: 16 for cuBLAS FP8, a scaling block for the block recipes.
FP8_ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


def pack(
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    ref_logps: Sequence[float] | None,
    *,
    multiple_of: int = 1,
    pad_id: int = 0,
    sharing: Sequence[int] | None = None,
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

    Neighbours that share a prompt have it once, before their responses. Every token keeps the
    position that it has in its sequence, and attention sees whole sequences (``SharedPrompts``).

    Args:
        sequences: [S] (prompt ids, response ids).
        ref_logps: [S] cached reference log-probabilities in nats, or None for zeros.
        multiple_of: T is padded up to a multiple of this with one more segment, which no row
            belongs to.
        pad_id: What that segment is filled with.
        sharing: How many neighbours have one prompt in common, group after group; adds up to S.
            None: no sequence shares its prompt.
        sampled_logprobs: [S] float32 arrays as long as the responses, and
        advantages: [S]; for policy steps only.
        loss_masks: [S] bool arrays as long as the responses, or None for all of a response; not
            together with ``sampled_logprobs``.
        is_preference: Passed on to the batch.

    Raises:
        ValueError: No sequence, an empty prompt (nothing would predict the first response
            token), an empty response or one with nothing marked, ref_logps of another length, or
            groups that are none.
    """
    prompt_S = np.array([len(prompt) for prompt, _ in sequences], dtype=np.int64)
    response_S = np.array([len(response) for _, response in sequences], dtype=np.int64)
    _check(prompt_S, response_S, ref_logps, sampled_logprobs)
    place = _Places.of(prompt_S, response_S, sharing, multiple_of)
    parts = [np.asarray(ids, dtype=np.int64) for sequence, owns in zip(
        sequences, place.owns_prompt_S, strict=True) for ids in sequence[0 if owns else 1 :]]
    tokens_T = np.concatenate([*parts, np.full(place.num_padding, pad_id, dtype=np.int64)])
    rows_R = _ranges(place.response_S - 1, response_S)
    # The first token of a response is predicted at the end of its prompt, wherever that stands.
    rows_R[np.cumsum(response_S) - response_S] = place.prompt_S + prompt_S - 1
    targets_R = tokens_T[_ranges(place.response_S, response_S)]
    segment_R, counted_S = np.repeat(np.arange(len(sequences)), response_S), response_S
    if loss_masks is not None and any(mask is not None for mask in loss_masks):
        mask_R = _joined_masks(loss_masks, response_S)
        rows_R, targets_R, segment_R = rows_R[mask_R], targets_R[mask_R], segment_R[mask_R]
        counted_S = np.bincount(segment_R, minlength=len(sequences))
    ref = np.zeros(len(sequences)) if ref_logps is None else np.asarray(ref_logps)
    segments = place.segment_lengths
    positions_A = torch.from_numpy(_ranges(np.zeros_like(segments), segments))
    shared = place.shared(prompt_S)
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens_T)[None],
        position_ids_T=(positions_A if shared is None else positions_A[shared.first_T])[None],
        cu_seqlens=torch.from_numpy(np.append(0, np.cumsum(segments)).astype(np.int32)),
        max_seqlen=int(segments.max()),  # on the host: attention would wait to read it
        rows_R=torch.from_numpy(rows_R),
        targets_R=torch.from_numpy(targets_R),
        segment_R=torch.from_numpy(segment_R),
        num_sequences=len(sequences),
        lengths_S=torch.from_numpy(counted_S),
        ref_logps_S=torch.from_numpy(ref.astype(np.float32)),
        final_S=torch.from_numpy(place.response_S + response_S - 1),
        sampled_logprobs_R=None if sampled_logprobs is None else torch.from_numpy(
            np.concatenate(sampled_logprobs).astype(np.float32)),
        advantages_S=None if advantages is None else torch.tensor(
            advantages, dtype=torch.float32),
        is_preference=is_preference,
        shared=shared,
    )


def _check(
    prompt_S: np.ndarray, response_S: np.ndarray, ref_logps: Sequence[float] | None,
    sampled_logprobs: Sequence[np.ndarray] | None,
) -> None:
    if not len(prompt_S) or not prompt_S.all() or not response_S.all():
        raise ValueError(f"prompt lengths {prompt_S.tolist()} and response lengths "
                         f"{response_S.tolist()} must all be positive, and there must be some")
    if ref_logps is not None and len(ref_logps) != len(prompt_S):
        raise ValueError(f"{len(ref_logps)} ref_logps for {len(prompt_S)} sequences")
    if sampled_logprobs is not None and list(map(len, sampled_logprobs)) != response_S.tolist():
        raise ValueError(f"sampled_logprobs of lengths {list(map(len, sampled_logprobs))} for "
                         f"responses of {response_S.tolist()} tokens")


class _Places(NamedTuple):
    """Where the prompts and responses of a pack stand.

    Attributes:
        owns_prompt_S: bool, whether its prompt stands before a response; else it is that of an
            earlier sequence.
        prompt_S, response_S: int64, position in T of the first token of each.
        segment_lengths: int64 [S], or [S + 1] with the padding: tokens of whole sequences.
        num_padding: Tokens of that.
    """

    owns_prompt_S: np.ndarray
    prompt_S: np.ndarray
    response_S: np.ndarray
    segment_lengths: np.ndarray
    num_padding: int

    @classmethod
    def of(
        cls, prompt_S: np.ndarray, response_S: np.ndarray, sharing: Sequence[int] | None,
        multiple_of: int,
    ) -> "_Places":
        count_G = np.asarray([1] * len(prompt_S) if sharing is None else sharing, np.int64)
        if count_G.sum() != len(prompt_S) or not count_G.all():
            raise ValueError(f"sharing={sharing} does not divide {len(prompt_S)} sequences")
        first_S = np.repeat(np.cumsum(count_G) - count_G, count_G)  # of each one's group
        if (prompt_S != prompt_S[first_S]).any():
            raise ValueError(f"prompts of {prompt_S.tolist()} tokens are not shared by groups of "
                             f"{count_G.tolist()} sequences")
        owns_S = first_S == np.arange(len(prompt_S))
        own_S = np.where(owns_S, prompt_S, 0)
        begin_S = np.cumsum(own_S + response_S) - own_S - response_S
        num_padding = int(-(own_S + response_S).sum() % multiple_of)
        # A sequence of its own, so that no real token sees the padding or is seen by it.
        padding = np.full(min(num_padding, 1), num_padding)
        return cls(
            owns_S, begin_S[first_S], begin_S + own_S,
            np.concatenate([prompt_S + response_S, padding]), num_padding,
        )

    def shared(self, prompt_lengths_S: np.ndarray) -> SharedPrompts | None:
        """None where every sequence owns its prompt."""
        count = len(prompt_lengths_S)
        if self.owns_prompt_S.all():
            return None
        response_lengths_S = self.segment_lengths[:count] - prompt_lengths_S
        starts_2S, lengths_2S = (np.stack(pair, axis=1).ravel() for pair in (
            (self.prompt_S, self.response_S), (prompt_lengths_S, response_lengths_S)))
        end = starts_2S[-1] + lengths_2S[-1]
        rows_A = np.append(_ranges(starts_2S, lengths_2S), end + np.arange(self.num_padding))
        return _shared(torch.from_numpy(rows_A))


def _shared(rows_A: Tensor) -> SharedPrompts:
    _, first_T, count_T = np.unique(rows_A.numpy(), return_index=True, return_counts=True)
    again_B = np.setdiff1d(np.arange(len(rows_A)), first_T, assume_unique=True)
    return SharedPrompts(rows_A, torch.from_numpy(first_T), torch.from_numpy(again_B),
                         int(count_T.max()))


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
    padding = int(batch.cu_seqlens[-1] - bounds[-1]) + missing
    num_kept = num_tokens - padding
    shared = batch.shared
    if shared is not None:
        rows_A = shared.rows_A[: int(bounds[-1])]
        shared = _shared(torch.cat([rows_A, torch.arange(num_kept, num_tokens)]))
    return replace(
        batch,
        tokens_T=F.pad(batch.tokens_T, (0, missing)),
        position_ids_T=torch.cat(
            [batch.position_ids_T[:, :num_kept], torch.arange(padding)[None]], dim=1
        ),
        cu_seqlens=torch.cat([bounds, bounds[-1:] + padding]),
        max_seqlen=max(batch.max_seqlen, padding),
        shared=shared,
    )


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
