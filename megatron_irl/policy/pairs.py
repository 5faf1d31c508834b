"""Pairs of a round into the bank: the policy's samples, each beside its demonstration."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, overload

import numpy as np

from megatron_irl.console import Console
from megatron_irl.data.pair_bank import Bounds
from megatron_irl.data.token_table import ordinals_of
from megatron_irl.generation.interface import SamplingConfig, request_key
from megatron_irl.parallel.agreement import stop_if_asked
from megatron_irl.parallel.main_rank import everywhere, on_main
from megatron_irl.parallel.reduce import gather_over_data_parallel, largest_over_world
from megatron_irl.parallel.topology import Topology
from megatron_irl.policy.interruptible import Interruptible
from megatron_irl.policy.policy import Policy
from megatron_irl.storage.shared_bank import SharedBank
from megatron_irl.timing import Clock
from megatron_irl.types import Demonstration, Pair, Sample


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
    topology, count = ranks(policy, console), len(demonstrations)
    if scheme > 1:  # every replica has parts of its own to write
        part_size = min(part_size, max(1, -(-count // topology.dp_size)))
    bounds = [(i, min(i + part_size, count)) for i in range(0, count, part_size)]
    parts = Parts(demonstrations, bank.begin_round(round_index, bounds), samples_per_prompt)
    # Once: it reads every part, each a sign of progress for the ranks that wait for it too.
    done = bank.discard_others(round_index, parts, policy.topology.heart.beat)
    left = [number for number in range(len(parts)) if number not in done]
    start = time.perf_counter()
    with clock.timed("generation"):
        if scheme == 1:
            tokens = _sample_by_part(policy, bank, round_index, parts, left, sampling, stream,
                                     console)
        else:
            seed = round_seed(sampling.seed, round_index, stream)
            tokens = _sample_share(policy, topology, bank, round_index, parts, left,
                                   replace(sampling, seed=seed), console)
        policy.release_cache()  # optimisation wants its memory
        bank.finish_round(round_index)  # a barrier too: every rank reads the pairs next
    seconds = time.perf_counter() - start
    return {
        "samples": samples_per_prompt * len(demonstrations), "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens else 0.0,
        **largest_over_world(policy.generation_costs(), topology),
    }


def ranks(policy: Policy, console: Console) -> Topology:
    """``Policy.sampling_ranks``, and a line about them if that is news. Collective likewise."""
    topology = policy.sampling_ranks()
    assert policy.generator is not None
    if note := policy.generator.take_note():
        console.note(note)
    return topology


def round_seed(seed: int, round_index: int, stream: int) -> int:
    """The seed of a round's samples, in [0, 2^64); a pure function, the same on every machine."""
    words = np.random.SeedSequence(seed, spawn_key=(round_index, stream, 2))
    return int(words.generate_state(1, np.uint64)[0])


class Parts(Sequence[list[Demonstration]]):
    """By part, the demonstration of every sample; a part is made when it is asked for.

    Args:
        demonstrations: Of the round.
        bounds: By part, the first of its demonstrations and the one after its last.
        samples_per_prompt: How often each stands in its part, in a row.
    """

    def __init__(
        self, demonstrations: Sequence[Demonstration], bounds: Bounds, samples_per_prompt: int
    ) -> None:
        self._all, self._bounds, self._samples = demonstrations, bounds, samples_per_prompt

    def __len__(self) -> int:
        return len(self._bounds)

    @overload
    def __getitem__(self, index: int) -> list[Demonstration]: ...
    @overload
    def __getitem__(self, index: slice) -> "Parts": ...
    def __getitem__(self, index: int | slice) -> "list[Demonstration] | Parts":
        if isinstance(index, slice):
            return Parts(self._all, self._bounds[index], self._samples)
        first, last = self._bounds[index]
        return [d for d in self._all[first:last] for _ in range(self._samples)]

    def keys(self) -> list[list[int]]:
        """By part, a key for each sample: its prompt's ordinal, and how many were before it.

        A round may hold a prompt twice, where one pass over the data ends in it.
        """
        before: dict[int, int] = {}
        keys: list[list[int]] = []
        ordinals = ordinals_of(self._all)
        for first, last in self._bounds:
            keys.append([])
            for ordinal in ordinals[first:last]:
                sample = before.get(ordinal, 0)
                before[ordinal] = sample + self._samples
                keys[-1] += [request_key(ordinal, sample + i) for i in range(self._samples)]
        return keys


def part_seed(seed: int, round_index: int, part: int) -> int:
    """The sampling seed that release 0.1.0 gave a part of a round, in [0, 2**31).

    A pure function, the same on every machine: runs that the release began go on with its samples.
    """
    words = np.random.SeedSequence(seed, spawn_key=(round_index, part))
    return int(words.generate_state(1, np.uint32)[0]) >> 1  # whatever takes a seed takes 31 bits


def _sample_by_part(
    policy: Policy, bank: SharedBank, round_index: int, parts: Parts,
    left: Sequence[int], sampling: SamplingConfig, stream: int, console: Console,
) -> int:
    """Sample as release 0.1.0 did: part by part, each dealt over the replicas. Returns tokens."""
    tokens = 0
    for number in left:
        part, seed = parts[number], part_seed(sampling.seed, round_index, stream + number)
        samples = generate(
            policy, [d.prompt_ids for d in part], replace(sampling, seed=seed), console
        )
        tokens += sum(len(sample.token_ids) for sample in samples)
        pairs = _pairs(part, samples, round_index)
        on_main(partial(bank.write_part, round_index, number, pairs), policy.topology)
        stop_if_asked(policy.topology)
    return tokens


def _sample_share(
    policy: Policy, topology: Topology, bank: SharedBank, round_index: int, parts: Parts,
    left: Sequence[int], sampling: SamplingConfig, console: Console,
) -> int:
    """Sample this replica's parts as one queue, and commit each part as it is complete.

    All samples of a prompt stand in one part and so are drawn by one replica. Returns the tokens
    that all replicas sampled.
    """
    # ``left`` is rank 0's list on every rank, so no part is drawn twice and none forgotten.
    mine = {number: parts[number] for number in left[topology.dp_rank :: topology.dp_size]}
    keys = parts.keys()  # of all: a prompt may also stand in a part that another replica draws
    places = [(number, i) for number, part in mine.items() for i in range(len(part))]
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
        if len(drawn[number]) < len(mine[number]):
            return
        samples = drawn.pop(number)
        # Every rank of the replica comes here with the same samples in the same order.
        if writes and not failed:
            in_order = [samples[i] for i in range(len(samples))]
            try:
                bank.write_part(
                    round_index, number, _pairs(mine[number], in_order, round_index)
                )
            except Exception as error:  # the replica's other ranks go on generating with this one
                failed.append(error)

    with console.generation(len(places)) as advance, queue.may_end():

        def look(finished: int, tokens: int) -> None:
            advance(finished, tokens)
            queue.look()

        policy.generate_share(
            [mine[number][i].prompt_ids for number, i in places], sampling, look,
            keys=[keys[number][i] for number, i in places], on_finished=keep,
        )

    def raise_failed() -> None:
        if failed:
            raise failed[0]

    # Replicas that are done wait here for the slowest. Its signs of progress do not reach their
    # watchdogs, so no part may take longer than ``parallel.hang_seconds``.
    everywhere(raise_failed, topology)
    stop_if_asked(topology)
    return sum(gather_over_data_parallel(tokens, topology))


def _pairs(
    part: Sequence[Demonstration], samples: Sequence[Sample], round_index: int
) -> list[Pair]:
    return [_pair(d, s, round_index) for d, s in zip(part, samples, strict=True)]


def generate(
    policy: Policy, prompts: Sequence[np.ndarray], sampling: SamplingConfig, console: Console
) -> list[Sample]:
    """``Policy.generate`` with its progress shown. Collective over every rank."""
    topology = ranks(policy, console)
    share = range(len(prompts))[topology.dp_rank :: topology.dp_size]
    with console.generation(len(share)) as advance:

        def look(finished: int, tokens: int) -> None:
            advance(finished, tokens)
            policy.topology.heart.beat()

        return policy.generate(prompts, sampling, look)


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
