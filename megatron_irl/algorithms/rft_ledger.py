"""The ledger of a round of rft: which demonstrations have their reward in it, and what it is."""

from collections.abc import Iterator

import numpy as np

from megatron_irl.algorithms.round import Round
from megatron_irl.data.ledger import LedgerRow, write_ledger
from megatron_irl.data.token_table import ids_of
from megatron_irl.parallel.agreement import stop_if_asked
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.train.batches import chosen

BLOCK = 1 << 16  # demonstrations that are scored together: what a rank has the ids of at a time


def write_round_ledger(round: Round) -> None:
    """Commit the reward of the round's demonstrations, and where it is due of all the others.

    The others can be thousands of times as many as the round's, so by default they have to wait for
    the last round. Every rank holds a number for each demonstration, and the ids of its share of a
    block; the main rank writes row after row. Collective.
    """
    recipe, demonstrations = round.recipe, round.data.demonstrations
    rewards = np.full(len(demonstrations), np.nan, np.float32)  # by ordinal, which is the position
    index = round.pairs.index
    rewards[index["ordinal"]] = index["reward_demo"]
    is_last = round.index + 1 == recipe.algorithm.rounds
    if is_last or recipe.reward.ledger == "every_round":
        rest = np.flatnonzero(np.isnan(rewards))
        for first in range(0, len(rest), BLOCK):
            # Equal blocks on every rank, since all know what is missing: scoring is collective.
            block = rest[first : first + BLOCK]
            sequences = list(ids_of(chosen(demonstrations, block.tolist())))
            with round.console.rewards(len(sequences)) as advance:
                rewards[block] = round.policy.score_rewards(sequences, on_progress=advance)
            stop_if_asked(round.policy.topology)
    heart = round.policy.topology.heart
    known = np.flatnonzero(~np.isnan(rewards))
    samples = _mean_by_ordinal(index)

    def rows() -> Iterator[LedgerRow]:
        for demonstration in chosen(demonstrations, known.tolist()):
            # Millions of rows take minutes, in which the others wait in ``on_main``: a sign of this
            # rank's is one for all of them.
            heart.beat()
            ordinal = demonstration.ordinal
            yield LedgerRow.of(demonstration, float(rewards[ordinal]), samples.get(ordinal))

    on_main(
        lambda: write_ledger(
            round.ledger, round.index, rows(), is_complete=len(known) == len(demonstrations)
        ),
        round.policy.topology,
    )


def _mean_by_ordinal(index: np.ndarray) -> dict[int, float]:
    """The mean reward of the samples of each prompt of the round."""
    order = np.argsort(index["ordinal"], kind="stable")
    ordinals, starts = np.unique(index["ordinal"][order], return_index=True)
    rewards = index["reward_sample"][order].astype(np.float64)
    groups = np.split(rewards, starts[1:])
    return {o: float(np.mean(g)) for o, g in zip(ordinals.tolist(), groups, strict=False)}
