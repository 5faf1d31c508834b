"""irft: demonstration against the policy's own sample, under the implicit reward.

r = beta * log(pi / pi_ref), arXiv 2405.17888, Algorithm 1. A round samples, caches log pi_ref of
demonstrations and samples, and takes ``steps_per_round`` steps on h(beta * g), anchored to the
demonstrations' likelihood unless the recipe says ``nll_coefficient: 0``, which is the paper's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_irl.algorithms.base import Algorithm, Phase, Work
from megatron_irl.config.schema import Recipe
from megatron_irl.errors import UserError

if TYPE_CHECKING:
    from megatron_irl.algorithms.round import Round


@dataclass(frozen=True)
class PairOptions:
    """Own keys of the algorithms that learn from pairs, in section ``algorithm``."""

    mix_previous: bool = False
    """spin only: train on the previous round's pairs as well."""


class Irft(Algorithm):
    """Rounds of generation, then optimisation of the implicit reward on the samples."""

    name = "irft"
    options = PairOptions
    default_anchor = 0.3

    def check(self, recipe: Recipe) -> None:
        """Refuse what only a pass over the data can mean."""
        if recipe.algorithm.mix_previous:
            raise UserError("algorithm.mix_previous=true conflicts with algorithm.name=irft; only "
                            "spin trains on the previous round's pairs. Set algorithm.mix_previous "
                            "to false, or algorithm.name to spin.")

    def phases(self, recipe: Recipe) -> list[Phase]:
        """One phase, on the round's pairs."""
        return [Phase(self.name, 0, recipe.algorithm.steps_per_round or 0, self.learn)]

    def learn(self, round: "Round", step: int) -> Work:
        """Demonstration against sample."""
        from megatron_irl.algorithms.pair_steps import learn_from_pairs

        del step
        return learn_from_pairs(round, round.pairs.rows())
