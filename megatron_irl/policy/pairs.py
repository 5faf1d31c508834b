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
from megatron_irl.generation.interface import SamplingConfig, request_key
from megatron_irl.parallel.agreement import stop_if_asked
from megatron_irl.parallel.main_rank import everywhere, on_main
from megatron_irl.parallel.reduce import gather_over_data_parallel
from megatron_irl.policy.interruptible import Interruptible
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
    scheme: int = 2, console: Console, clock: Clock,
) -> dict[str, Any]:
    """Sample responses to every prompt and commit the pairs, part by part; skips done parts.

    The samples of a prompt follow each other, each as a pair with the prompt's demonstration.

    Args:
        sampling: Its seed is the run's, of which others derive.
        part_size: Most prompts of a part.
        stream: Keeps the seeds of several banks apart.
        scheme: 2: what is drawn depends on (seed, round, stream), the prompt and the number of the
            sample alone. 1, of runs that release 0.1.0 began: on the part and the place in it.

    Returns:
        ``samples``, ``seconds`` and ``tokens_per_second`` of what this call sampled, and on CUDA
        what capturing graphs took and the phases' peaks of memory in GiB.

    Raises:
        RunStopped: A rank was asked to stop; the parts that are complete are on disk.

    Collectives: every rank must call.
    """
    topology, count = policy.topology, len(demonstrations)
    if scheme > 1:  # every replica has parts of its own to write
        part_size = min(part_size, max(1, -(-count // topology.dp_size)))
    bounds = [(i, min(i + part_size, count)) for i in range(0, count, part_size)]
    parts = [
        [d for d in demonstrations[first:last] for _ in range(samples_per_prompt)]
        for first, last in bank.begin_round(round_index, bounds)
    ]
    bank.discard_others(round_index, parts)
    done = bank.done_parts(round_index)  # once: it is collective, and reads every part
    left = [number for number in range(len(parts)) if number not in done]
    start = time.perf_counter()
    with clock.timed("generation"):
        if scheme == 1:
            tokens = _sample_by_part(policy, bank, round_index, parts, left, sampling, stream,
                                     console)
        else:
            seed = round_seed(sampling.seed, round_index, stream)
            tokens = _sample_share(policy, bank, round_index, parts, left,
                                   replace(sampling, seed=seed), console)
        policy.release_cache()  # optimisation wants its memory
        bank.finish_round(round_index)  # a barrier too: every rank reads the pairs next
    seconds = time.perf_counter() - start
    return {
        "samples": samples_per_prompt * len(demonstrations), "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens else 0.0, **policy.generation_costs(),
    }


def round_seed(seed: int, round_index: int, stream: int) -> int:
    """The seed of a round's samples, in [0, 2^64); a pure function, the same on every machine."""
    words = np.random.SeedSequence(seed, spawn_key=(round_index, stream, 2))
    return int(words.generate_state(1, np.uint64)[0])


def _sample_by_part(
    policy: Policy, bank: SharedBank, round_index: int, parts: Sequence[list[Demonstration]],
    left: Sequence[int], sampling: SamplingConfig, stream: int, console: Console,
) -> int:
    """Sample as release 0.1.0 did: part by part, each dealt over the replicas. Returns tokens."""
    tokens = 0
    for number in left:
        seed = chunk_seed(sampling.seed, round_index, stream + number)
        samples = generate(
            policy, [d.prompt_ids for d in parts[number]], replace(sampling, seed=seed), console
        )
        tokens += sum(len(sample.token_ids) for sample in samples)
        pairs = _pairs(parts[number], samples, round_index)
        on_main(partial(bank.write_part, round_index, number, pairs), policy.topology)
        stop_if_asked(policy.topology)
    return tokens


def _sample_share(
    policy: Policy, bank: SharedBank, round_index: int, parts: Sequence[list[Demonstration]],
    left: Sequence[int], sampling: SamplingConfig, console: Console,
) -> int:
    """Sample this replica's parts as one queue, and commit each part as it is complete.

    All samples of a prompt stand in one part and so are drawn by one replica. Returns the tokens
    that all replicas sampled.
    """
    topology = policy.topology
    numbered, mine = _number_samples(parts), left[topology.dp_rank :: topology.dp_size]
    places = [(number, i) for number in mine for i in range(len(parts[number]))]
    drawn: dict[int, dict[int, Sample]] = {number: {} for number in mine}
    queue = Interruptible(topology, drawn)
    failed: list[Exception] = []
    writes = topology.tp_rank == topology.pp_rank == 0  # one rank of a replica
    tokens = 0

    def keep(request: int, sample: Sample) -> None:
        nonlocal tokens
        number, i = places[request]
        drawn[number][i] = sample
        tokens += len(sample.token_ids)
        if len(drawn[number]) < len(parts[number]):
            return
        samples = drawn.pop(number)
        if writes and not failed:
            in_order = [samples[i] for i in range(len(samples))]
            try:
                bank.write_part(
                    round_index, number, _pairs(parts[number], in_order, round_index)
                )
            except Exception as error:  # the replica's other ranks go on generating with this one
                failed.append(error)

    with console.generation(len(places)) as advance, queue.may_end():

        def look(finished: int, tokens: int) -> None:
            advance(finished, tokens)
            queue.look()

        policy.generate_share(
            [parts[number][i].prompt_ids for number, i in places], sampling, look,
            keys=[numbered[number][i] for number, i in places], on_finished=keep,
        )

    def raise_failed() -> None:
        if failed:
            raise failed[0]

    everywhere(raise_failed, topology)
    stop_if_asked(topology)
    return sum(gather_over_data_parallel(tokens, topology))


def _number_samples(parts: Sequence[Sequence[Demonstration]]) -> list[list[int]]:
    """A key for each sample of a round: its prompt's ordinal, and how many were before it.

    A round may hold a prompt twice, where one pass over the data ends in it.
    """
    before: dict[int, int] = {}
    keys = []
    for part in parts:
        keys.append([])
        for demonstration in part:
            sample = before.get(demonstration.ordinal, 0)
            before[demonstration.ordinal] = sample + 1
            keys[-1].append(request_key(demonstration.ordinal, sample))
    return keys


def _pairs(
    part: Sequence[Demonstration], samples: Sequence[Sample], round_index: int
) -> list[Pair]:
    return [_pair(d, s, round_index) for d, s in zip(part, samples, strict=True)]


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
    mismatch = Mismatch()
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
                stop_if_asked(policy.topology)
        pairs.finish()  # a barrier too: no update before every reference is on disk
    return {"mismatch": mismatch.summary()}


def _score_pairs(policy: Policy, pairs: list[Pair], console: Console) -> list[np.ndarray]:
    def score(sequences: Sequences) -> list[np.ndarray]:
        with console.reference(len(sequences)) as advance:
            return policy.score(sequences, on_progress=advance)

    return score_distinct(pairs, score)


class Mismatch:
    """Difference of the engine's and the trainer's log-probability of every sampled token.

    Sums alone are kept: a round has as many differences as its samples have tokens.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._sum = self._sum_abs = self._max_abs = 0.0  # nats

    def add(self, pairs: Sequence[Pair], scores: Sequence[np.ndarray]) -> None:
        """Count the samples of pairs.

        Args:
            scores: Of [demonstration, sample] of each pair: nats of each token.
        """
        for pair, trainer in zip(pairs, scores[1::2], strict=True):
            if len(pair.sample_ids):
                difference = pair.sample_logprobs.astype(np.float64) - trainer
                absolute = np.abs(difference)
                self._tokens += len(difference)
                self._sum += float(difference.sum())
                self._sum_abs += float(absolute.sum())
                self._max_abs = max(self._max_abs, float(absolute.max()))

    def summary(self) -> dict[str, float]:
        """``kl`` estimates KL(engine || trainer) per token from the engine's own samples."""
        if not self._tokens:
            return {}
        return {
            "mean_abs": self._sum_abs / self._tokens,
            "max_abs": self._max_abs,
            "kl": self._sum / self._tokens,
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
