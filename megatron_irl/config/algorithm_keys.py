"""Keys and sections that algorithms bring into a recipe, and which algorithm reads what."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from megatron_irl.algorithms.registry import all_rules, rules_of
from megatron_irl.config.schema import AlgorithmConfig, Recipe
from megatron_irl.errors import UserError

COMMON_KEYS = tuple(f.name for f in dataclasses.fields(AlgorithmConfig) if f.name != "options")


@functools.cache
def own_keys() -> dict[str, tuple[str, ...]]:
    """Keys of section ``algorithm`` that are some algorithm's own, by key the algorithms' names."""
    found: dict[str, tuple[str, ...]] = {}
    for rules in all_rules():
        for field in dataclasses.fields(rules.options) if rules.options else ():
            found[field.name] = (*found.get(field.name, ()), rules.name)
    return found


@functools.cache
def own_sections() -> dict[str, dict[str, type[Any]]]:
    """Sections that algorithms bring: by section, the dataclass of each algorithm that has it."""
    found: dict[str, dict[str, type[Any]]] = {}
    for rules in all_rules():
        for name, cls in rules.sections.items():
            found.setdefault(name, {})[rules.name] = cls
    return found


def own_section_keys(name: str) -> tuple[str, ...]:
    """Keys that a section of algorithms has for any of them."""
    classes = own_sections()[name].values()
    return tuple(dict.fromkeys(f.name for cls in classes for f in dataclasses.fields(cls)))


def check_given_keys(algorithm: str, given: Mapping[str, Any]) -> None:
    """Refuse keys that the algorithm would ignore, even where they repeat the default.

    Args:
        algorithm: ``algorithm.name``.
        given: The recipe's mapping as written.

    Raises:
        UserError: A common key that the algorithm does not read, or a key of another algorithm's.
    """
    rules, keys = rules_of(algorithm), given["algorithm"]
    for key, reason in rules.unread.items():
        if key in keys:
            raise UserError(f"algorithm.{key} conflicts with algorithm.name={algorithm}; {reason}")
    for key, owners in own_keys().items():
        if key in keys and algorithm not in owners:
            raise _foreign(f"algorithm.{key}", algorithm, owners)
    for name, owners in own_sections().items():
        for key in given.get(name) or {}:
            if algorithm not in owners:
                raise _foreign(f"{name}.{key}", algorithm, tuple(owners))


def check_idle_keys(recipe: Recipe) -> None:
    """The same for a recipe that was not read from a mapping: values that differ from defaults.

    Raises:
        UserError: As ``check_given_keys``.
    """
    rules = rules_of(recipe.algorithm.name)
    given = {
        f.name: getattr(recipe.algorithm, f.name) for f in dataclasses.fields(AlgorithmConfig)
        if f.name not in rules.filled and getattr(recipe.algorithm, f.name) != f.default
    }
    check_given_keys(recipe.algorithm.name, {"algorithm": given})


def _foreign(path: str, algorithm: str, owners: tuple[str, ...]) -> UserError:
    verb = "has" if len(owners) == 1 else "have"
    return UserError(
        f"{path} conflicts with algorithm.name={algorithm}; only {' and '.join(owners)} {verb} "
        f"this key, so it would do nothing. Remove {path} or set algorithm.name to "
        f"{' or '.join(owners)}."
    )
