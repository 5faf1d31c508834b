"""Bounds of single values, in the words a user reads; shared by all checks of a recipe."""

from collections.abc import Iterable
from typing import Any

from megatron_irl.config.schema import Recipe
from megatron_irl.errors import UserError


def value_at(recipe: Recipe, path: str) -> Any:
    """The value of a dotted key such as ``train.micro_batch_size``."""
    value: Any = recipe
    for name in path.split("."):
        value = getattr(value, name)
    return value


def check_at_least_one(recipe: Recipe, paths: Iterable[str]) -> None:
    """Raise UserError for the first key that is given and below 1."""
    for path in paths:
        value = value_at(recipe, path)
        if value is not None and value < 1:
            raise UserError(f"{path}={value} is below 1; it counts things. Set {path} to 1 or "
                            "more.")


def check_not_negative(recipe: Recipe, paths: Iterable[str]) -> None:
    """Raise UserError for the first key that is given and below 0."""
    for path in paths:
        value = value_at(recipe, path)
        if value is not None and value < 0:
            raise UserError(f"{path}={value} is negative. Set {path} to 0 or more.")


def check_range(path: str, value: float, interval: str, inside: bool) -> None:
    """Raise UserError unless ``inside``; ``interval`` is how it is written, as in ``(0, 1]``."""
    if not inside:
        raise UserError(f"{path}={value} is outside {interval}. Set {path} to a number in "
                        f"{interval}.")
