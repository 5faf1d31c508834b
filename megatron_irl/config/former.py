"""The default that a later version changed: how it names a run, and what an earlier run keeps.

``algorithm.nll_coefficient`` was 0 for every algorithm; where a recipe is silent it is 0.3 for irft
since (``docs/study.md`` says why). A run that began with 0 goes on with 0.
"""

import dataclasses

from megatron_irl.algorithms.registry import rules_of
from megatron_irl.config.schema import Recipe

KEY, FORMER = "algorithm.nll_coefficient", 0.0  # this value was never in a fingerprint


def keep_former(recipe: Recipe, known: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe for going on with a run, and a line for the user where that is not the default.

    Kept is only the default of before, and only where the recipe is silent: whatever else differs
    is another experiment, which is refused by name.

    Args:
        recipe: Not resolved.
        known: Of the run, as recorded; without the key in a record that is older than the key.
    """
    rules = rules_of(recipe.algorithm.name)
    silent = recipe.algorithm.nll_coefficient is None and "nll_coefficient" not in rules.unread
    if not silent or known.algorithm.nll_coefficient not in (None, FORMER):
        return recipe, []
    algorithm = dataclasses.replace(recipe.algorithm, nll_coefficient=FORMER)
    now = rules.default_anchor
    notes = [] if now == FORMER else [
        f"{KEY} is {FORMER:g}, as this run began; a run that begins now has {now:g}."]
    return dataclasses.replace(recipe, algorithm=algorithm), notes
