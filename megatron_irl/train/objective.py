"""Which pure objective a step minimises, over one packed microbatch."""

from functools import partial

from torch import Tensor

from megatron_irl.config import Recipe
from megatron_irl.objectives import irft_loss, sequence_logprobs, sft_loss
from megatron_irl.train.step import Objective
from megatron_irl.types import LossOutput, PackedBatch


def build_objective(recipe: Recipe, round_index: int) -> Objective:
    """The objective of one round; ``algorithm.beta`` may differ between rounds."""
    algorithm = recipe.algorithm
    if not algorithm.is_pairwise:
        return _sft
    return partial(
        _irft,
        beta=algorithm.beta[round_index],
        loss=algorithm.loss,
        nll_coefficient=algorithm.nll_coefficient,
        length_normalize=algorithm.length_normalize,
    )


def _sft(logprobs_R: Tensor, batch: PackedBatch) -> LossOutput:
    logps_S = sequence_logprobs(logprobs_R, batch.segment_R, batch.num_sequences)
    return sft_loss(logprobs_R, logps_S)


def _irft(logprobs_R: Tensor, batch: PackedBatch, **options: object) -> LossOutput:
    logps_S = sequence_logprobs(logprobs_R, batch.segment_R, batch.num_sequences)
    return irft_loss(logps_S, batch.ref_logps_S, batch.lengths_S, **options)  # type: ignore[arg-type]
