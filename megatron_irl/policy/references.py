"""The scores of a round's pairs: each replica scores parts of its own and writes them back.

What every rank learns of the others' pairs are numbers: the index of the round (``index_pairs``),
and sums.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_irl.console import Console
from megatron_irl.data.pair_bank import PairBank
from megatron_irl.data.pair_index import INDEX, index_of
from megatron_irl.data.round_pairs import RoundPairs
from megatron_irl.parallel.agreement import ReplicaStop, stop_if_asked
from megatron_irl.parallel.main_rank import everywhere
from megatron_irl.parallel.reduce import gather_in_turn
from megatron_irl.parallel.topology import Topology
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.scoring import Sums, distinct_sequences, rounded
from megatron_irl.timing import Clock
from megatron_irl.types import Pair


def open_pairs(bank: PairBank, round_index: int) -> RoundPairs:
    """The pairs of a round that is on disk, none read yet; none where it is not finished.

    What every rank reads is what the manifest has that rank 0 gave to all. Collectives: none.
    """
    return RoundPairs(bank, round_index, bank.parts(round_index))


def index_pairs(pairs: RoundPairs, topology: Topology) -> RoundPairs:
    """Make ``pairs.index`` of a round as it is on disk now; each replica reads its share of parts.

    Returns ``pairs``. Collectives: every rank must call.

    Raises:
        UserError: A part is missing or damaged.
    """
    mine = _share(pairs, topology)
    found = everywhere(
        lambda: [index_of(part, number) for number, part in read_parts(pairs, mine, topology)],
        topology,
    )
    # In the order of the parts, whoever read them: positions in the index are what every rank
    # draws and splits by.
    pairs.index = np.concatenate([np.zeros(0, INDEX), *gather_in_turn(found, topology)])
    return pairs


def read_parts(
    pairs: RoundPairs, numbers: Iterable[int], topology: Topology
) -> Iterator[tuple[int, list[Pair]]]:
    """Parts with their numbers, each a sign of progress: a round's can take minutes to read."""
    for number in numbers:
        topology.heart.beat()
        yield number, pairs.part(number)


def _share(pairs: RoundPairs, topology: Topology) -> tuple[int, ...]:
    """The parts of a round that this replica reads whole."""
    return pairs.parts[topology.dp_rank :: topology.dp_size]


def score_parts[T](
    policy: Policy, pairs: RoundPairs, score: Callable[[list[Pair]], T]
) -> list[T]:
    """Score the parts of a round, each by one replica, which writes it back.

    Args:
        score: Adds what it finds to the pairs of a part. Its collectives are those of a replica.

    Returns:
        What ``score`` returned, by part: small, it goes to every rank.

    Collectives: every rank must call.

    Raises:
        UserError: Of any rank. ``TrainingDiverged`` is one.
        RunStopped: A rank was asked to stop; parts scored by then are written.
    """
    topology, mine = policy.topology, _share(pairs, policy.topology)
    # A replica without a part of its own repeats the last one: with ddp.overlap_param_gather
    # replicas exchange parameters in the first forward after an update, so each runs one.
    passes = mine or pairs.parts[-1:]
    # Each rank reads for itself, and one that cannot must not leave its peers in a forward.
    everywhere(lambda: list(read_parts(pairs, passes, topology)), topology)
    writes = topology.tp_rank == topology.pp_rank == 0  # one rank of a replica
    found: list[T] = []

    def work() -> None:
        failed: list[Exception] = []
        stop = ReplicaStop(topology)
        for number in passes:
            found.append(score(pairs.part(number)))
            if writes and mine and not failed:
                try:
                    pairs.commit(number)
                except Exception as error:  # the replica's other ranks go on with this one
                    failed.append(error)
            if stop.level():
                break
        if failed:
            raise failed[0]

    everywhere(work, topology)
    stop_if_asked(topology)  # what is scored is on disk, and is scored again to the same
    pairs.release(but=mine)  # of the others this rank has what they were before
    pairs.finish()  # a barrier too: no update before every part is on disk
    return gather_in_turn(found[: len(mine)], topology)


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

    def score(part: list[Pair], *, alone: bool = True) -> tuple[float, ...]:
        sequences, places = distinct_sequences(part)
        against: list[np.ndarray | None] = [None] * len(sequences)
        for place, pair in zip(places[1::2], part, strict=True):
            against[place] = pair.sample_logprobs
        with console.reference(len(sequences)) as advance:
            sums = policy.score_sums(sequences, against=against, alone=alone, on_progress=advance)
        if alone:
            logps = rounded(sums.logp[places])
            for i, pair in enumerate(part):
                pair.ref_demo_logp, pair.ref_sample_logp = logps[2 * i], logps[2 * i + 1]
        return Mismatch.numbers(sum(len(pair.sample_ids) for pair in part), sums)

    with clock.timed("reference"):
        if weights_of is not None and pairs.parts:
            # The policy's own pass, on one part, for the mismatch.
            first = everywhere(lambda: pairs.part(pairs.parts[0]), policy.topology)
            mismatch.add(score(first, alone=False))
        with policy.with_weights_of(weights_of):
            by_part = score_parts(policy, pairs, score)
        if weights_of is None:
            for numbers in by_part:
                mismatch.add(numbers)
    return {"mismatch": mismatch.summary()}


class Mismatch:
    """Difference of the engine's and the trainer's log-probability of every sampled token.

    Sums alone are kept: a round has as many differences as its samples have tokens.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._sum = self._sum_abs = self._max_abs = 0.0  # nats

    @staticmethod
    def numbers(tokens: int, sums: Sums) -> tuple[float, ...]:
        """What is to be known of some samples of so many tokens."""
        return (float(tokens), float(sums.difference.sum()), float(sums.absolute.sum()),
                float(sums.largest.max(initial=0.0)))

    def add(self, numbers: tuple[float, ...]) -> None:
        """Count the samples of a part."""
        tokens, difference, absolute, largest = numbers
        self._tokens += tokens
        self._sum += difference
        self._sum_abs += absolute
        self._max_abs = max(self._max_abs, largest)

    def summary(self) -> dict[str, float]:
        """``kl`` estimates KL(engine || trainer) per token from the engine's own samples."""
        if not self._tokens:
            return {}
        return {
            "mean_abs": self._sum_abs / self._tokens,
            "max_abs": self._max_abs,
            "kl": self._sum / self._tokens,
        }
