"""Log-probabilities and rewards of many sequences under the weights as they are.

The same packed forward as training gives the reference cache, held-out likelihood, rewards and
the engine-trainer mismatch.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from megatron_irl.data.packing import pack
from megatron_irl.errors import TrainingDiverged
from megatron_irl.parallel.reduce import from_last_stage, gather_over_data_parallel
from megatron_irl.train.batches import Sequences, token_budget_split
from megatron_irl.train.step import Stepper
from megatron_irl.types import PackedBatch

OnProgress = Callable[[int], None]


def score_sequences(
    stepper: Stepper,
    sequences: Sequences,
    *,
    max_tokens: int = 4096,
    multiple_of: int = 1,
    on_progress: OnProgress | None = None,
) -> list[np.ndarray]:
    """Token log-probabilities of every response.

    Args:
        sequences: (prompt ids, response ids), the same list on every rank.
        max_tokens: Tokens of one packed forward.
        on_progress: Called with about the number of sequences finished so far, over all ranks.

    Returns:
        Per sequence float32 [response tokens], nats, in input order, on every rank.

    Gradient: none. Collectives: every rank of the run must call.

    Raises:
        TrainingDiverged: A log-probability is NaN or infinite: the weights are no good.
    """
    scores = _in_packs(
        stepper, stepper.token_logprobs, sequences, max_tokens, multiple_of, on_progress
    )
    bad = sum(not np.isfinite(values).all() for values in scores)
    if bad:
        raise TrainingDiverged(
            f"log-probabilities of {bad} of {len(sequences)} sequences are not finite"
        )
    return scores


def score_rewards(
    stepper: Stepper, sequences: Sequences, *, max_tokens: int = 4096, multiple_of: int = 1,
    on_progress: OnProgress | None = None,
) -> list[float]:
    """The explicit reward of every response; as ``score_sequences``.

    Raises:
        TrainingDiverged: A reward is NaN or infinite.
    """
    rewards = [
        float(value)
        for value in _in_packs(
            stepper, stepper.rewards, sequences, max_tokens, multiple_of, on_progress
        )
    ]
    bad = sum(not np.isfinite(value) for value in rewards)
    if bad:
        raise TrainingDiverged(f"rewards of {bad} of {len(sequences)} sequences are not finite")
    return rewards


def _in_packs(
    stepper: Stepper, compute: Callable[[Sequence[PackedBatch]], list[list[Tensor]]],
    sequences: Sequences, max_tokens: int, multiple_of: int, on_progress: OnProgress | None = None,
) -> list[np.ndarray]:
    """What ``compute`` says of every sequence, in input order, on every rank."""
    topology = stepper.topology
    split = token_budget_split(sequences, max_tokens=max_tokens)
    # A rank without a pack of its own repeats the last one, the cheapest, to the same numbers:
    # with ddp.overlap_param_gather the first forward after an update is where data-parallel ranks
    # exchange their parameters, so one that ran none would leave the others waiting.
    mine = split[topology.dp_rank :: topology.dp_size] or split[-1:]
    scored: dict[int, np.ndarray] = {}
    group = max(8, 2 * topology.pp_size)  # packs in flight: enough to fill the pipeline
    for start in range(0, len(mine), group):
        part = mine[start : start + group]
        outputs = compute([
            pack([sequences[i] for i in indices], None, multiple_of=multiple_of)
            for indices in part
        ])
        for indices, parts in zip(part, outputs, strict=False):
            scored |= {i: t.numpy() for i, t in zip(indices, parts, strict=True)}
        if on_progress is not None:  # the other ranks are about as far
            on_progress(sum(map(len, split[: (start + group) * topology.dp_size])))
    scored = from_last_stage(scored, topology)
    merged = {i: v for part in gather_over_data_parallel(scored, topology) for i, v in part.items()}
    return [merged[i] for i in range(len(sequences))]


def summed(token_logprobs: list[np.ndarray]) -> list[float]:
    """Sum per sequence in float64, stored as the nearest float32."""
    return [float(np.float32(values.sum(dtype=np.float64))) for values in token_logprobs]
