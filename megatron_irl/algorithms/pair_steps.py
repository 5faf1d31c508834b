"""The steps of irft and spin: pairs, their implicit reward, and the loss of it."""

from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from megatron_irl.algorithms.base import Work
from megatron_irl.algorithms.round import Round
from megatron_irl.config import Recipe
from megatron_irl.data.pair_index import USABLE
from megatron_irl.data.round_pairs import PairRows
from megatron_irl.objectives import irft_loss, sequence_logprobs
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.policy.references import add_references, index_pairs, open_pairs
from megatron_irl.train.step import Objective
from megatron_irl.types import LossOutput, PackedBatch


def learn_from_pairs(round: Round, drawn: PairRows) -> Work:
    """The usable ones of ``drawn`` under the implicit reward."""
    pairs = usable(drawn)
    return Work(
        pairs, pair_objective(round.recipe, round.index), num_unusable=len(drawn) - len(pairs),
        summary={"lengths": mean_lengths(pairs)},
    )


def usable(drawn: PairRows) -> PairRows:
    """Those that can teach."""
    return drawn.chosen(np.flatnonzero(drawn.numbers["kind"] == USABLE))


def previous_pairs(round: Round) -> PairRows:
    """The pairs of the round before, with reference log-probabilities of this round's policy.

    They are kept in a bank of their own: those in the run's bank belong to the round before.
    Collectives: every rank must call, before the round's first update.
    """
    # The bank's answers are equal on every rank: what follows is collective.
    bank, topology = round.previous_bank, round.policy.topology
    if not bank.has_references(round.index):
        source, before = round.pairs.bank, round.index - 1
        manifest = source.require(before)
        rows = np.cumsum([0, *(manifest[part].rows for part in sorted(manifest))]).tolist()
        bank.begin_round(round.index, list(zip(rows, rows[1:], strict=False)))

        def copy() -> None:
            for part in sorted(manifest):
                topology.heart.beat()  # for the others too, which wait in ``on_main``
                pairs = source.read_part(before, part)
                for pair in pairs:  # so that a run killed before the pass below repeats it
                    pair.ref_demo_logp = pair.ref_sample_logp = None
                bank.write_part(round.index, part, pairs)

        on_main(copy, topology)
        bank.finish_round(round.index)  # the pass reads what rank 0 has written
        add_references(
            round.policy, open_pairs(bank, round.index), weights_of=round.reference_weights,
            console=round.console, clock=round.clock,
        )
    return index_pairs(open_pairs(bank, round.index), topology).rows()


def pair_objective(recipe: Recipe, round_index: int) -> Objective:
    """The implicit reward's loss; ``algorithm.beta`` may differ between rounds."""
    algorithm = recipe.algorithm
    return partial(
        _irft,
        beta=algorithm.beta[round_index],
        loss=algorithm.loss,
        nll_coefficient=algorithm.nll_coefficient,
        length_normalize=algorithm.length_normalize,
    )


def _irft(logprobs_R: Tensor, batch: PackedBatch, **options: Any) -> LossOutput:
    # [demo_0, sample_0, demo_1, ...]: pairs are neighbours of one microbatch (``train.batches``).
    logps_S = sequence_logprobs(logprobs_R, batch.segment_R, batch.num_sequences)
    return irft_loss(logps_S, batch.ref_logps_S, batch.lengths_S, **options)


def mean_lengths(pairs: PairRows) -> dict[str, float]:
    """Mean tokens of demonstrations and samples."""
    count = max(1, len(pairs))
    return {
        "demo_mean": int(pairs.numbers["demo_length"].sum()) / count,
        "sample_mean": int(pairs.numbers["sample_length"].sum()) / count,
    }
