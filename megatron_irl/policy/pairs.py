"""Pairs of a round into the bank: the policy's samples, and the reference's log-probabilities."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_irl.console import Console
from megatron_irl.data.pair_bank import PairBank, chunk_seed
from megatron_irl.data.round_pairs import RoundPairs
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.scoring import Sequences, score_distinct, summed
from megatron_irl.storage.shared_bank import SharedBank
from megatron_irl.timing import Clock
from megatron_irl.types import Demonstration, Pair, Sample


def open_pairs(bank: PairBank, round_index: int) -> RoundPairs:
    """The pairs of a round that is on disk, none read yet; none where it is not finished.

    What every rank reads is what the manifest has that rank 0 gave to all. Collectives: none.
    """
    return RoundPairs(bank, round_index, bank.parts(round_index))


def sample_pairs(
    policy: Policy, bank: SharedBank, round_index: int, demonstrations: Sequence[Demonstration], *,
    sampling: SamplingConfig, part_size: int, stream: int = 0, samples_per_prompt: int = 1,
    console: Console, clock: Clock,
) -> dict[str, Any]:
    """Sample responses to every prompt and commit the pairs, part by part; skips done parts.

    The samples of a prompt follow each other, each as a pair with the prompt's demonstration.

    Args:
        sampling: Its seed is the run's; the seed of a part derives from (run seed, round, part),
            so an interrupted generation goes on to the samples it would have drawn.
        part_size: Prompts of a part.
        stream: Keeps the seeds of several banks apart.

    Returns:
        ``samples``, ``seconds`` and ``tokens_per_second`` of what this call sampled.

    Collectives: every rank must call.
    """
    topology, count = policy.topology, len(demonstrations)
    bounds = [(i, min(i + part_size, count)) for i in range(0, count, part_size)]
    parts = [
        [d for d in demonstrations[first:last] for _ in range(samples_per_prompt)]
        for first, last in bank.begin_round(round_index, bounds)
    ]
    bank.discard_others(round_index, parts)
    done = bank.done_parts(round_index)
    tokens, start = 0, time.perf_counter()
    with clock.timed("generation"):
        for number, part in enumerate(parts):
            if number in done:
                continue
            seed = chunk_seed(sampling.seed, round_index, stream + number)
            samples = generate(policy, [d.prompt_ids for d in part], replace(sampling, seed=seed),
                               console)
            tokens += sum(len(sample.token_ids) for sample in samples)
            pairs = [_pair(d, s, round_index) for d, s in zip(part, samples, strict=True)]
            on_main(partial(bank.write_part, round_index, number, pairs), topology)
        policy.release_cache()  # the KV cache goes before optimisation
        bank.finish_round(round_index)  # a barrier too: every rank reads the pairs next
    seconds = time.perf_counter() - start
    return {
        "samples": samples_per_prompt * len(demonstrations), "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens else 0.0,
    }


def generate(
    policy: Policy, prompts: Sequence[np.ndarray], sampling: SamplingConfig, console: Console
) -> list[Sample]:
    """``Policy.generate`` with its progress shown. Collective over every rank."""
    share = range(len(prompts))[policy.topology.dp_rank :: policy.topology.dp_size]
    with console.generation(len(share)) as advance:
        return policy.generate(prompts, sampling, advance)


def add_references(
    policy: Policy, pairs: RoundPairs, *, weights_of: Path | None, console: Console, clock: Clock
) -> dict[str, Any]:
    """One evaluation-mode pass stores every pair's reference log-probabilities in the bank.

    Without ``weights_of`` the pass runs on the policy itself, before its first update, and doubles
    as the engine-trainer mismatch measurement.

    Args:
        weights_of: HF folder whose weights are the reference; swapped in for the pass.

    Returns:
        ``mismatch``: how the engine's and the trainer's log-probabilities of the samples differ.

    Collectives: every rank must call.
    """
    mismatch = _Mismatch()
    with clock.timed("reference"):
        if weights_of is not None and pairs.parts:
            # The policy's own pass, on one part, for the mismatch.
            first = pairs.part(pairs.parts[0])
            mismatch.add(first, _score_pairs(policy, first, console))
        with policy.with_weights_of(weights_of):
            for number in pairs.parts:
                part = pairs.part(number)
                scores = _score_pairs(policy, part, console)
                if weights_of is None:
                    mismatch.add(part, scores)
                sums = summed(scores)
                for i, pair in enumerate(part):
                    pair.ref_demo_logp, pair.ref_sample_logp = sums[2 * i], sums[2 * i + 1]
                on_main(partial(pairs.commit, number), policy.topology)
        pairs.finish()  # a barrier too: no update before every reference is on disk
    return {"mismatch": mismatch.summary()}


def _score_pairs(policy: Policy, pairs: list[Pair], console: Console) -> list[np.ndarray]:
    def score(sequences: Sequences) -> list[np.ndarray]:
        with console.reference(len(sequences)) as advance:
            return policy.score(sequences, on_progress=advance)

    return score_distinct(pairs, score)


class _Mismatch:
    """Difference of the engine's and the trainer's log-probability of every sampled token."""

    def __init__(self) -> None:
        self.differences: list[np.ndarray] = []

    def add(self, pairs: Sequence[Pair], scores: Sequence[np.ndarray]) -> None:
        for pair, trainer in zip(pairs, scores[1::2], strict=True):
            if len(pair.sample_ids):
                self.differences.append(pair.sample_logprobs.astype(np.float64) - trainer)

    def summary(self) -> dict[str, float]:
        """``kl`` estimates KL(engine || trainer) per token from the engine's own samples."""
        if not self.differences:
            return {}
        difference = np.concatenate(self.differences)
        return {
            "mean_abs": float(np.abs(difference).mean()),
            "max_abs": float(np.abs(difference).max()),
            "kl": float(difference.mean()),
        }


def _pair(demonstration: Demonstration, sample: Sample, round_index: int) -> Pair:
    return Pair(
        ordinal=demonstration.ordinal,
        prompt_ids=demonstration.prompt_ids,
        demo_ids=demonstration.response_ids,
        sample_ids=sample.token_ids,
        sample_logprobs=sample.logprobs,
        finish_reason=sample.finish_reason,
        round=round_index,
    )
