"""Global batches → this rank's packed microbatches."""

from collections.abc import Sequence
from typing import cast

import numpy as np

from megatron_irl.data.balance import assign, assign_by_tokens
from megatron_irl.data.packing import pack
from megatron_irl.data.preferences import Preference
from megatron_irl.data.sampler import OrderedSampler
from megatron_irl.data.stored import Stored
from megatron_irl.flops import Tokens
from megatron_irl.parallel.topology import Topology
from megatron_irl.policy.scoring import Sequences
from megatron_irl.types import Demonstration, PackedBatch, Pair, Rollout

Item = Demonstration | Pair | Preference | Rollout


def microbatches_for(
    items: Sequence[Item], topology: Topology, *, multiple_of: int, micro_batch_size: int = 1,
    micro_batch_tokens: int | None = None, share_prompts: bool = True,
) -> list[PackedBatch]:
    """This data-parallel rank's microbatches of a global batch, balanced by tokens.

    Every rank computes the same split, so no communication is needed, and all have equally many.
    Pairs become [demonstration, sample] neighbours of one microbatch, because the loss needs both;
    preferences [chosen, rejected]. All items are of one kind; only this rank's are made.

    Args:
        multiple_of: What T of every microbatch is padded up to a multiple of.
        micro_batch_size: Items in each; read without
        micro_batch_tokens: as many items as have so many tokens; see ``assign_by_tokens``.
        share_prompts: An item's prompt stands in the pack once, before all of its responses.
    """
    # Lengths of all items decide, which every rank knows; the items of others are not made.
    lengths = token_counts(items, share_prompts=share_prompts)
    mine = share_of(lengths, topology, micro_batch_size, micro_batch_tokens)
    return [_pack([items[i] for i in chosen], multiple_of, share_prompts) for chosen in mine]


def share_of(
    lengths: Sequence[int], topology: Topology, micro_batch_size: int,
    micro_batch_tokens: int | None,
) -> list[list[int]]:
    """Which items of a global batch, by their tokens, are in each of this rank's microbatches."""
    if micro_batch_tokens is None:
        bins = assign(lengths, len(lengths) // micro_batch_size, micro_batch_size)
    else:
        # Dealt below, as many to each replica. The interleaved schedule runs microbatches in groups
        # of one per stage.
        group = topology.pp_size if topology.vpp_size > 1 else 1
        bins = assign_by_tokens(lengths, micro_batch_tokens, topology.dp_size * group)
    return bins[topology.dp_rank :: topology.dp_size]


def draw(num_items: int, seed: int, step: int, size: int) -> list[int]:
    """The global batch of a step: the items in one shuffled order per pass, pass after pass.

    A pure function of its arguments, so a resumed run draws what the uninterrupted one would.
    """
    return OrderedSampler(num_items, seed, step * size).take(size)


def chosen[T](items: Sequence[T], indices: Sequence[int]) -> Sequence[T]:
    """These of the items; of stored ones none is made."""
    if isinstance(items, Stored):
        return cast(Sequence[T], items.chosen(indices))
    return [items[i] for i in indices]


def token_counts(items: Sequence[Item], *, share_prompts: bool) -> list[int]:
    """``num_tokens`` of every item; stored ones are not made for it."""
    if isinstance(items, Stored):
        return items.token_counts(share_prompts=share_prompts)
    return [num_tokens(item, share_prompts=share_prompts) for item in items]


def work_of(microbatches: Sequence[PackedBatch]) -> Tokens:
    """What the sequences of packs add up to; padding is no work."""
    lengths = np.concatenate(
        [np.diff(batch.cu_seqlens[: batch.num_sequences + 1].numpy()) for batch in microbatches]
    ).astype(np.int64)
    rows = sum(len(batch.rows_R) for batch in microbatches)
    again = sum(0 if batch.shared is None else len(batch.shared.again_B) for batch in microbatches)
    return Tokens(int(lengths.sum()) - again, int((lengths**2).sum()), rows, len(lengths),
                  int(lengths.max()), again)


def num_tokens(item: Item, *, share_prompts: bool = True) -> int:
    """Tokens a step processes for one item: its responses, and the prompt once or for each."""
    sequences = sequences_of(item)
    prompts = [len(prompt) for prompt, _ in sequences[: 1 if share_prompts else None]]
    return sum(prompts) + sum(len(response) for _, response in sequences)


def sequences_of(item: Item) -> Sequences:
    """(prompt ids, response ids) of each sequence of an item."""
    match item:
        case Pair():
            responses = [item.demo_ids, item.sample_ids]
        case Preference():
            responses = [item.chosen_ids, item.rejected_ids]
        case Rollout():
            responses = [item.sample_ids]
        case Demonstration():
            responses = [item.response_ids]
    return [(item.prompt_ids, response) for response in responses]


def _pack(items: Sequence[Item], multiple_of: int, share_prompts: bool) -> PackedBatch:
    groups = [sequences_of(item) for item in items]
    sequences = [sequence for group in groups for sequence in group]
    pairs = [item for item in items if isinstance(item, Pair)]
    rollouts = [item for item in items if isinstance(item, Rollout)]
    refs: list[float] = [rollout.ref_logp for rollout in rollouts]
    for pair in pairs:
        assert pair.ref_demo_logp is not None and pair.ref_sample_logp is not None
        refs += [pair.ref_demo_logp, pair.ref_sample_logp]
    return pack(
        sequences, refs or None, multiple_of=multiple_of,
        sharing=[len(group) for group in groups] if share_prompts else None,
        sampled_logprobs=[r.sample_logprobs for r in rollouts] or None,
        advantages=[r.advantage for r in rollouts] or None,
        loss_masks=[item.loss_mask for item in items if isinstance(item, Demonstration)] or None,
        is_preference=isinstance(items[0], Preference),
    )
