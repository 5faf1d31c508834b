"""Derived values, and the recipe as YAML again."""

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from megatron_irl.algorithms.registry import rules_of
from megatron_irl.config.bounds import value_at
from megatron_irl.config.schema import DataSource, Recipe
from megatron_irl.errors import UserError


def resolve(recipe: Recipe, num_demonstrations: int) -> Recipe:
    """Fill every derived value, so that the recipe says in full what the run does.

    ``beta`` becomes one number per round; ``max_new_tokens`` follows
    ``data.max_response_length``; ``steps_per_round`` and ``prompts_per_round`` follow from the
    number of demonstrations. For spin a round is one pass over the data:
    ``prompts_per_round = num_demonstrations`` and ``steps_per_round = ceil(num_demonstrations /
    train.global_batch_size)``. Resolving twice changes nothing.

    Args:
        recipe: As loaded.
        num_demonstrations: Records kept of ``data.train``.

    Raises:
        UserError: No demonstrations, or a spin recipe that sets another round length.
    """
    if num_demonstrations < 1:
        files = ", ".join(map(str, recipe.data.train))
        raise UserError(f"data.train={files} has no usable demonstration; at least 1 is needed. "
                        "Set data.train to a file that has some.")
    recipe = rules_of(recipe.algorithm.name).resolve(recipe, num_demonstrations)
    max_new_tokens = recipe.generation.max_new_tokens or recipe.data.max_response_length
    return replace(recipe, generation=replace(recipe.generation, max_new_tokens=max_new_tokens))


def to_yaml(recipe: Recipe) -> str:
    """Write a recipe, resolved or not, as YAML that ``load_recipe`` reads back to the same one."""
    return yaml.safe_dump(to_mapping(recipe), sort_keys=False, allow_unicode=True)


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """The nested mapping of the YAML file; keys that the algorithm does not have are left out."""
    rules = rules_of(recipe.algorithm.name)
    mapping = dataclasses.asdict(recipe)
    mapping["model"] = {"hf": recipe.model.hf, **recipe.model.overrides}
    mapping["algorithm"] |= mapping["algorithm"].pop("options") or {}
    mapping |= mapping.pop("sections")
    for path in ("data.train", "data.eval", "data.eval_preferences", rules.preferences):
        if path is not None:
            section, _, key = path.partition(".")
            mapping[section][key] = _written(value_at(recipe, path))
    for key in rules.unread:
        del mapping["algorithm"][key]
    return _plain(mapping)


def _written(sources: Sequence[str | DataSource]) -> list[Any]:
    """Sources as the recipe has them: a path, or a mapping of the keys that are set."""
    return [
        each if isinstance(each, str) else
        {"path": list(each.path)} | {
            f.name: getattr(each, f.name) for f in dataclasses.fields(each)
            if f.name != "path" and getattr(each, f.name) not in (f.default, {})}
        for each in sources
    ]


def _plain(value: Any) -> Any:
    """YAML knows lists and mappings only."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
