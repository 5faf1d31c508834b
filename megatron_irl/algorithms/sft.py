"""sft: the likelihood of the demonstrations."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from megatron_irl.algorithms.base import Algorithm, Phase, Work
from megatron_irl.config.bounds import check_range
from megatron_irl.config.schema import Recipe
from megatron_irl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_irl.algorithms.round import Round
    from megatron_irl.types import LossOutput, PackedBatch

_ABOUT_SAMPLES = ("prompts_per_round", "beta", "loss", "reference", "nll_coefficient",
                  "length_normalize")


@dataclass(frozen=True)
class SftOptions:
    """Own keys of section ``algorithm``."""

    token_weight: Literal["one", "probability"] = "one"
    """``probability``: each token counts by what the policy gives it (dynamic fine-tuning)."""
    label_smoothing: float = 0.0
    """Share of every target that is spread evenly over the vocabulary, in [0, 1). The loss is then
    torch's ``cross_entropy(..., label_smoothing=...)`` over response tokens."""


class Sft(Algorithm):
    """Rounds of steps on the demonstrations alone; the passes go on from round to round."""

    name = "sft"
    options = SftOptions
    draws_samples = False
    reward = "none"
    unread = {
        key: "sft draws no samples, so the key would do nothing. Remove algorithm." + key
             + " or set algorithm.name to irft or spin."
        for key in _ABOUT_SAMPLES
    }

    def check(self, recipe: Recipe) -> None:
        """Refuse held-out preferences, which it has nothing to judge by."""
        if recipe.data.eval_preferences:
            raise UserError("data.eval_preferences conflicts with algorithm.name=sft; sft learns "
                            "no reward. Remove data.eval_preferences, or set algorithm.name to "
                            "irft, spin or rft.")
        smoothing, weight = recipe.algorithm.label_smoothing, recipe.algorithm.token_weight
        check_range("algorithm.label_smoothing", smoothing, "[0, 1)", 0 <= smoothing < 1)
        if smoothing and weight != "one":
            raise UserError(f"algorithm.label_smoothing={smoothing} conflicts with "
                            f"algorithm.token_weight={weight}; smoothed targets have no one "
                            "probability to weigh a token by. Remove one of them.")

    def phases(self, recipe: Recipe) -> list[Phase]:
        """One phase."""
        return [Phase(self.name, 0, recipe.algorithm.steps_per_round or 0, _imitate,
                      sequences_per_item=1)]

    def facts(self, recipe: object) -> list[str]:
        """Nothing besides the schedule."""
        return []

    def ln2_curve(self, recipe: object) -> tuple[bool, str]:
        """Its loss is no margin."""
        return False, ""


def _imitate(round: "Round", step: int) -> Work:
    del step
    options = round.recipe.algorithm
    demonstrations = round.data.demonstrations
    if options.label_smoothing:
        smoothed = partial(smoothed_objective, smoothing=options.label_smoothing)
        return Work(demonstrations, smoothed, heads="smoothed", outlasts_round=True)
    by_probability = options.token_weight == "probability"
    objective = partial(likelihood_objective, by_probability=by_probability)
    return Work(demonstrations, objective, outlasts_round=True)


def likelihood_objective(
    logprobs_R: "Tensor", batch: "PackedBatch", *, by_probability: bool = False
) -> "LossOutput":
    """The demonstrations' negative log-likelihood, a sum over response tokens in nats."""
    from megatron_irl.objectives import sequence_logprobs, sft_loss

    logps_S = sequence_logprobs(logprobs_R, batch.segment_R, batch.num_sequences)
    return sft_loss(logprobs_R, logps_S, by_probability=by_probability)


def smoothed_objective(
    outputs_R2: "Tensor", batch: "PackedBatch", *, smoothing: float
) -> "LossOutput":
    """The same with smoothed targets.

    Args:
        outputs_R2: [R, 2] nats, of each response token and the mean over the vocabulary.
        smoothing: ``algorithm.label_smoothing``.
    """
    from megatron_irl.objectives import sequence_logprobs, sft_loss

    logprobs_R, mean_R = outputs_R2.unbind(-1)
    logps_S = sequence_logprobs(logprobs_R, batch.segment_R, batch.num_sequences)
    return sft_loss(logprobs_R, logps_S, mean_R=mean_R, smoothing=smoothing)
