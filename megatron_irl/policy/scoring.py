"""Many sequences through the packed forward of training, in packs, over all replicas.

The same forward gives the reference cache, held-out likelihood, rewards and the engine-trainer
mismatch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from megatron_irl import hardware
from megatron_irl.data.packing import pack
from megatron_irl.errors import TrainingDiverged
from megatron_irl.parallel.reduce import from_last_stage, gather_over_data_parallel
from megatron_irl.parallel.topology import Topology
from megatron_irl.policy.score_packs import Sequences, token_budget_split
from megatron_irl.types import PackedBatch, Pair

# Of one forward pass. What a layer makes of 4096 tokens is more than a CPU's caches hold
# (docs/scaling.md, "Beside other trainers", has the reference pass with either).
GPU_PACK_TOKENS, CPU_PACK_TOKENS = 4096, 1024
PACK_TOKENS = GPU_PACK_TOKENS if hardware.IS_CUDA else CPU_PACK_TOKENS

OnProgress = Callable[[int], None]
Compute = Callable[[Sequence[PackedBatch]], list[list[Tensor]]]


class Sums(NamedTuple):
    """What is known of every sequence's token log-probabilities besides themselves: float64 [n].

    Attributes:
        logp: Their sum, in nats.
        difference, absolute, largest: Of what others said of the tokens, less these: the sum, the
            sum of absolute values, and the largest absolute value. Zeros where none said anything.
    """

    logp: np.ndarray
    difference: np.ndarray
    absolute: np.ndarray
    largest: np.ndarray

    @staticmethod
    def of(values: np.ndarray, others: np.ndarray | None) -> tuple[float, float, float, float]:
        """The four numbers of one sequence; ``others`` are float32 [tokens] or None."""
        logp = float(values.sum(dtype=np.float64))
        if others is None or not len(others):
            return logp, 0.0, 0.0, 0.0
        difference = others.astype(np.float64) - values
        absolute = np.abs(difference)
        return logp, float(difference.sum()), float(absolute.sum()), float(absolute.max())


def score_in_packs(
    compute: Compute, sequences: Sequences, topology: Topology, *, max_tokens: int,
    multiple_of: int, share_prompts: bool = True, on_progress: OnProgress | None = None,
) -> list[np.ndarray]:
    """What ``compute`` says of every sequence, in input order, on every rank.

    A rank is sent every token's score of every sequence: for a few sequences, or where each token
    is asked for. ``sum_in_packs`` sends sums.

    Args: as ``scored_in_packs``. Collectives: every rank of the run must call.
    """
    scored = scored_in_packs(
        compute, sequences, topology.dp_rank, topology.dp_size, topology,
        max_tokens=max_tokens, multiple_of=multiple_of, share_prompts=share_prompts,
        on_progress=on_progress,
    )
    # First down the pipeline of each replica, then across replicas: after the two every rank has
    # every score.
    scored = from_last_stage(scored, topology)
    merged = {i: v for part in gather_over_data_parallel(scored, topology) for i, v in part.items()}
    return [merged[i] for i in range(len(sequences))]


def sum_in_packs[N: (float, tuple[float, ...])](
    compute: Compute, sequences: Sequences, topology: Topology,
    numbers: Callable[[int, np.ndarray], N], *, alone: bool, multiple_of: int,
    max_tokens: int = PACK_TOKENS, share_prompts: bool = True,
    on_progress: OnProgress | None = None,
) -> np.ndarray:
    """A few numbers of what ``compute`` says of each sequence; no other leaves its rank.

    Args:
        numbers: (position of the sequence, its scores) -> a number, or always as many.
        alone: The sequences are this replica's own, and only its ranks learn the numbers.
            Otherwise they are the same on every rank, split over the replicas.

    Returns:
        float64 [sequences] or [sequences, numbers].

    Collectives: the ranks of a replica if ``alone``, else every rank of the run.
    """
    rank, count = (0, 1) if alone else (topology.dp_rank, topology.dp_size)
    scored = scored_in_packs(
        compute, sequences, rank, count, topology,
        max_tokens=max_tokens, multiple_of=multiple_of, share_prompts=share_prompts,
        on_progress=on_progress,
    )
    places = np.array(sorted(scored), np.int64)
    found = np.array([numbers(i, scored[i]) for i in places.tolist()], np.float64)
    parts = [from_last_stage((places, found), topology)]
    # A pack that was repeated is in the parts of several ranks, with the same numbers.
    if not alone:
        parts = gather_over_data_parallel(parts[0], topology)
    whole = np.zeros((len(sequences), *parts[0][1].shape[1:]))
    for where, values in parts:
        whole[where] = values
    return whole


def scored_in_packs(
    compute: Compute, sequences: Sequences, rank: int, count: int, topology: Topology, *,
    max_tokens: int, multiple_of: int, share_prompts: bool = True,
    on_progress: OnProgress | None = None,
) -> dict[int, np.ndarray]:
    """What ``compute`` says of this replica's share of the sequences, by position.

    Empty except on the last pipeline stage.

    Args:
        compute: Microbatches → per microbatch, per sequence a tensor on the CPU; empty except on
            the last pipeline stage.
        sequences: The same list on every rank that shares them.
        rank, count: The share is every ``count``-th pack from ``rank`` on.
        max_tokens: Tokens of one packed forward.
        multiple_of: Of the tokens of a pack.
        share_prompts: A prompt that neighbours have in common is computed once for them.
        on_progress: Called with about the number of sequences finished so far, over all shares.

    Collectives: the ranks of a replica.
    """
    split = token_budget_split(sequences, max_tokens=max_tokens, share_prompts=share_prompts)
    # A rank without a pack of its own repeats the last one, the cheapest, to the same numbers:
    # with ddp.overlap_param_gather the first forward after an update is where data-parallel ranks
    # exchange their parameters, so one that ran none would leave the others waiting.
    mine = split[rank::count] or split[-1:]
    scored: dict[int, np.ndarray] = {}
    group = max(8, 2 * topology.pp_size)  # packs in flight: enough to fill the pipeline
    for start in range(0, len(mine), group):
        part = mine[start : start + group]
        topology.heart.beat()
        outputs = compute([
            pack([sequences[i] for indices in groups for i in indices], None,
                 multiple_of=multiple_of, sharing=[len(indices) for indices in groups])
            for groups in part
        ])
        for groups, parts in zip(part, outputs, strict=False):
            places = (i for indices in groups for i in indices)
            scored |= {i: t.numpy() for i, t in zip(places, parts, strict=True)}
        if on_progress is not None:  # the other ranks are about as far
            on_progress(sum(len(i) for g in split[: (start + group) * count] for i in g))
    return scored


def distinct_sequences(pairs: Sequence[Pair]) -> tuple[Sequences, list[int]]:
    """What is to be scored for pairs: each demonstration once, however many samples it has.

    An empty sample has no rows to score; its demonstration stands in, and the pair is never
    trained on.

    Returns:
        The sequences, and in them the places of [demo_0, sample_0, demo_1, ...].
    """
    sequences: Sequences = []
    places: list[int] = []
    demo_at: dict[int, int] = {}
    for pair in pairs:
        if pair.ordinal not in demo_at:
            demo_at[pair.ordinal] = len(sequences)
            sequences.append((pair.prompt_ids, pair.demo_ids))
        places += [demo_at[pair.ordinal], len(sequences)]
        sample = pair.sample_ids if len(pair.sample_ids) else pair.demo_ids
        sequences.append((pair.prompt_ids, sample))
    return sequences, places


def rounded(sums: np.ndarray) -> list[float]:
    """Each as the nearest float32, as the bank stores them."""
    return sums.astype(np.float32).tolist()


def check_finite(values: np.ndarray, what: str) -> None:
    """Raise TrainingDiverged where a sequence's sum, or its reward, is NaN or infinite."""
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise TrainingDiverged(f"{what} of {bad} of {len(values)} sequences are not finite")
