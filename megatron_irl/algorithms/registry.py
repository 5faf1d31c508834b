"""The names a recipe may give in ``algorithm.name``, and where each algorithm is.

A new algorithm is a file in this folder and a line here. The line is a string because the recipe
is read by processes that never train (a launcher, ``plan`` on a login node): an algorithm's file is
imported when its recipe is, and keeps torch and Megatron out of its own imports.
"""

import functools
import importlib
from typing import TYPE_CHECKING

from megatron_irl.errors import UserError

if TYPE_CHECKING:
    from megatron_irl.algorithms.rules import AlgorithmRules

REGISTRY = {
    "sft": "megatron_irl.algorithms.sft:Sft",
    "irft": "megatron_irl.algorithms.irft:Irft",
    "spin": "megatron_irl.algorithms.spin:Spin",
    "rft": "megatron_irl.algorithms.rft:Rft",
}


def rules_of(name: str) -> "AlgorithmRules":
    """The algorithm of a name; one object per name and process.

    Example:
        ``rules_of(recipe.algorithm.name).resolve(recipe, num_demonstrations=1000)``

    Raises:
        UserError: There is none of this name.
    """
    if name not in REGISTRY:
        raise UserError(f"algorithm.name={name} is not one of {', '.join(REGISTRY)}; "
                        "set algorithm.name to one of them.")
    return _load(REGISTRY[name])


def all_rules() -> "list[AlgorithmRules]":
    """Every algorithm, in the order of the registry."""
    return [rules_of(name) for name in REGISTRY]


@functools.cache
def _load(target: str) -> "AlgorithmRules":
    module, _, kind = target.partition(":")
    return getattr(importlib.import_module(module), kind)()
