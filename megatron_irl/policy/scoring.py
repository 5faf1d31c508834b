"""Many sequences through the packed forward of training, in packs, over all replicas.

The same forward gives the reference cache, held-out likelihood, rewards and the engine-trainer
mismatch.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from megatron_irl.data.packing import pack
from megatron_irl.parallel.reduce import from_last_stage, gather_over_data_parallel
from megatron_irl.parallel.topology import Topology
from megatron_irl.types import PackedBatch, Pair

OnProgress = Callable[[int], None]
Sequences = list[tuple[np.ndarray, np.ndarray]]
"""(prompt ids, response ids), int32."""


def score_in_packs(
    compute: Callable[[Sequence[PackedBatch]], list[list[Tensor]]], sequences: Sequences,
    topology: Topology, *, max_tokens: int, multiple_of: int,
    on_progress: OnProgress | None = None,
) -> list[np.ndarray]:
    """What ``compute`` says of every sequence, in input order, on every rank.

    Args:
        compute: Microbatches → per microbatch, per sequence a tensor on the CPU; empty except on
            the last pipeline stage.
        sequences: The same list on every rank.
        max_tokens: Tokens of one packed forward.
        multiple_of: Of the tokens of a pack.
        on_progress: Called with about the number of sequences finished so far, over all ranks.

    Collectives: every rank of the run must call.
    """
    split = token_budget_split(sequences, max_tokens=max_tokens)
    # A rank without a pack of its own repeats the last one, the cheapest, to the same numbers:
    # with ddp.overlap_param_gather the first forward after an update is where data-parallel ranks
    # exchange their parameters, so one that ran none would leave the others waiting.
    mine = split[topology.dp_rank :: topology.dp_size] or split[-1:]
    scored: dict[int, np.ndarray] = {}
    group = max(8, 2 * topology.pp_size)  # packs in flight: enough to fill the pipeline
    for start in range(0, len(mine), group):
        part = mine[start : start + group]
        topology.heart.beat()
        outputs = compute([
            pack([sequences[i] for i in indices], None, multiple_of=multiple_of)
            for indices in part
        ])
        for indices, parts in zip(part, outputs, strict=False):
            scored |= {i: t.numpy() for i, t in zip(indices, parts, strict=True)}
        if on_progress is not None:  # the other ranks are about as far
            on_progress(sum(map(len, split[: (start + group) * topology.dp_size])))
    # First down the pipeline of each replica, then across replicas: after the two every rank has
    # every score.
    scored = from_last_stage(scored, topology)
    merged = {i: v for part in gather_over_data_parallel(scored, topology) for i, v in part.items()}
    return [merged[i] for i in range(len(sequences))]


def token_budget_split(sequences: Sequences, *, max_tokens: int) -> list[list[int]]:
    """Split sequences for evaluation, longest first, up to ``max_tokens`` together.

    Only positions: there may be millions of sequences, of which a rank packs its own and those
    only when their turn comes. A longer sequence is alone.
    """
    lengths = [sum(map(len, sequence)) for sequence in sequences]
    split: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not split or tokens + lengths[index] > max_tokens:
            split.append([])
            tokens = 0
        split[-1].append(index)
        tokens += lengths[index]
    return split


def score_distinct[T](pairs: Sequence[Pair], score: Callable[[Sequences], list[T]]) -> list[T]:
    """The scores of [demo_0, sample_0, demo_1, ...]; a repeated demonstration is scored once.

    An empty sample has no rows to score; its demonstration stands in, and the pair is never
    trained on.
    """
    sequences: Sequences = []
    wanted: list[int] = []
    demo_at: dict[int, int] = {}
    for pair in pairs:
        if pair.ordinal not in demo_at:
            demo_at[pair.ordinal] = len(sequences)
            sequences.append((pair.prompt_ids, pair.demo_ids))
        wanted += [demo_at[pair.ordinal], len(sequences)]
        sample = pair.sample_ids if len(pair.sample_ids) else pair.demo_ids
        sequences.append((pair.prompt_ids, sample))
    scores = score(sequences)
    return [scores[i] for i in wanted]


def summed(token_logprobs: list[np.ndarray]) -> list[float]:
    """Sum per sequence in float64, stored as the nearest float32."""
    return [float(np.float32(values.sum(dtype=np.float64))) for values in token_logprobs]
