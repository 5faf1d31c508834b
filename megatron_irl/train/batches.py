"""Global batches → this rank's packed microbatches."""

from collections.abc import Sequence

from megatron_irl.data.packing import assign, assign_by_tokens, pack
from megatron_irl.data.preferences import Preference
from megatron_irl.data.sampler import OrderedSampler
from megatron_irl.parallel.topology import Topology
from megatron_irl.policy.scoring import Sequences
from megatron_irl.types import Demonstration, PackedBatch, Pair, Rollout

Item = Demonstration | Pair | Preference | Rollout


def microbatches_for(
    items: Sequence[Item], topology: Topology, *, multiple_of: int, micro_batch_size: int = 1,
    micro_batch_tokens: int | None = None,
) -> list[PackedBatch]:
    """This data-parallel rank's microbatches of a global batch, balanced by tokens.

    Every rank computes the same split, so no communication is needed, and all have equally many.
    Pairs become [demonstration, sample] neighbours of one microbatch, because the loss needs both;
    preferences [chosen, rejected]. All items are of one kind.

    Args:
        multiple_of: What T of every microbatch is padded up to a multiple of.
        micro_batch_size: Items in each; read without
        micro_batch_tokens: as many items as have so many tokens; see ``assign_by_tokens``.
    """
    lengths = [num_tokens(item) for item in items]
    if micro_batch_tokens is None:
        bins = assign(lengths, len(items) // micro_batch_size, micro_batch_size)
    else:
        # The interleaved schedule runs microbatches in groups of one per stage.
        group = topology.pp_size if topology.vpp_size > 1 else 1
        bins = assign_by_tokens(lengths, micro_batch_tokens, topology.dp_size * group)
    mine = bins[topology.dp_rank :: topology.dp_size]
    return [_pack([items[i] for i in chosen], multiple_of) for chosen in mine]


def draw(items: Sequence[Item], seed: int, step: int, size: int) -> list[Item]:
    """The global batch of a step: the items in one shuffled order per pass, pass after pass.

    A pure function of its arguments, so a resumed run draws what the uninterrupted one would.
    """
    return [items[i] for i in OrderedSampler(len(items), seed, step * size).take(size)]


def num_tokens(item: Item) -> int:
    """Tokens a step processes for one item: prompt and response of each of its sequences."""
    return sum(len(prompt) + len(response) for prompt, response in sequences_of(item))


def sequences_of(item: Item) -> Sequences:
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


def _pack(items: Sequence[Item], multiple_of: int) -> PackedBatch:
    sequences = [sequence for item in items for sequence in sequences_of(item)]
    pairs = [item for item in items if isinstance(item, Pair)]
    rollouts = [item for item in items if isinstance(item, Rollout)]
    refs: list[float] = [rollout.ref_logp for rollout in rollouts]
    for pair in pairs:
        assert pair.ref_demo_logp is not None and pair.ref_sample_logp is not None
        refs += [pair.ref_demo_logp, pair.ref_sample_logp]
    return pack(
        sequences, refs or None, multiple_of=multiple_of,
        sampled_logprobs=[r.sample_logprobs for r in rollouts] or None,
        advantages=[r.advantage for r in rollouts] or None,
        loss_masks=[item.loss_mask for item in items if isinstance(item, Demonstration)] or None,
        is_preference=isinstance(items[0], Preference),
    )
