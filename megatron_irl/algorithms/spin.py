"""spin: irft with one generation per pass over the data.

The opponent and the reference are both the weights at the start of the pass. On request the pairs
of the pass before are trained on as well.
"""

from typing import TYPE_CHECKING

from megatron_irl.algorithms.base import Work
from megatron_irl.algorithms.irft import Irft
from megatron_irl.config.schema import Recipe
from megatron_irl.errors import UserError

if TYPE_CHECKING:
    from megatron_irl.algorithms.round import Round


class Spin(Irft):
    """A round is a pass over the data."""

    name = "spin"
    default_anchor = 0.0

    def check(self, recipe: Recipe) -> None:
        """Refuse a reference that is not the pass's opponent."""
        if recipe.algorithm.reference == "initial":
            raise UserError("algorithm.reference=initial conflicts with algorithm.name=spin; "
                            "spin's opponent and reference are both the weights at the start of "
                            "the pass. Set algorithm.reference to round_start, or algorithm.name "
                            "to irft.")

    def round_size(self, recipe: Recipe, num_demonstrations: int) -> tuple[int, int]:
        """Every demonstration once.

        Raises:
            UserError: The recipe sets another round length.
        """
        size = {
            "steps_per_round": -(-num_demonstrations // recipe.train.global_batch_size),
            "prompts_per_round": num_demonstrations,
        }
        for key, value in size.items():
            given = getattr(recipe.algorithm, key)
            if given not in (None, value):
                raise UserError(f"algorithm.{key}={given} conflicts with algorithm.name=spin; a "
                                f"round of spin is one pass over the data, here {value}. Remove "
                                f"algorithm.{key}, or set algorithm.name to irft.")
        return size["steps_per_round"], size["prompts_per_round"]

    def uses_previous_pairs(self, recipe: Recipe) -> bool:
        """On request; see ``learn``."""
        return recipe.algorithm.mix_previous

    def learn(self, round: "Round", step: int) -> Work:
        """Demonstration against sample, of this pass and on request of the one before."""
        from megatron_irl.algorithms.pair_steps import learn_from_pairs, previous_pairs

        pairs = round.pairs.rows()
        if self.uses_previous_pairs(round.recipe) and round.index > 0:
            pairs = pairs + previous_pairs(round)
        return learn_from_pairs(round, pairs)
