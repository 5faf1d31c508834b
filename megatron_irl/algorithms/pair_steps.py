"""The steps of irft and spin: pairs, their implicit reward, and the loss of it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from megatron_irl.algorithms.base import Work
from megatron_irl.algorithms.round import Round
from megatron_irl.config import Recipe
from megatron_irl.data.pair_bank import usable_pairs
from megatron_irl.objectives import irft_loss, sequence_logprobs
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.policy.pairs import add_references, open_pairs
from megatron_irl.train.step import Objective
from megatron_irl.types import LossOutput, PackedBatch, Pair


def learn_from_pairs(round: Round, drawn: Sequence[Pair]) -> Work:
    """The usable ones of ``drawn`` under the implicit reward."""
    pairs, _ = usable_pairs(drawn)
    return Work(
        pairs, pair_objective(round.recipe, round.index), num_unusable=len(drawn) - len(pairs),
        summary={"lengths": mean_lengths(pairs)},
    )


def previous_pairs(round: Round) -> list[Pair]:
    """The pairs of the round before, with reference log-probabilities of this round's policy.

    They are kept in a bank of their own: those in the run's bank belong to the round before.
    Collectives: every rank must call, before the round's first update.
    """
    # The bank's answers are equal on every rank: what follows is collective.
    bank, topology = round.previous_bank, round.policy.topology
    if not bank.has_references(round.index):
        source = open_pairs(round.pairs.bank, round.index - 1)
        rows = np.cumsum([0, *(len(source.part(part)) for part in source.parts)]).tolist()
        bank.begin_round(round.index, list(zip(rows, rows[1:], strict=False)))

        def copy() -> None:
            for part in source.parts:
                for pair in source.part(part):  # so that a run killed before the pass below
                    pair.ref_demo_logp = pair.ref_sample_logp = None  # repeats it
                bank.write_part(round.index, part, source.part(part))

        on_main(copy, topology)
        bank.finish_round(round.index)  # the pass reads what rank 0 has written
        rescored = open_pairs(bank, round.index)
        add_references(
            round.policy, rescored, weights_of=round.reference_weights, console=round.console,
            clock=round.clock,
        )
        return rescored.all()
    return open_pairs(bank, round.index).all()


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
    logps_S = sequence_logprobs(logprobs_R, batch.segment_R, batch.num_sequences)
    return irft_loss(logps_S, batch.ref_logps_S, batch.lengths_S, **options)


def mean_lengths(pairs: Sequence[Pair]) -> dict[str, float]:
    """Mean tokens of demonstrations and samples."""
    count = max(1, len(pairs))
    return {
        "demo_mean": sum(len(pair.demo_ids) for pair in pairs) / count,
        "sample_mean": sum(len(pair.sample_ids) for pair in pairs) / count,
    }
