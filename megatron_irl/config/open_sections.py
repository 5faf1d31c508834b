"""Sections that take a Megatron dataclass's fields by its own names: names and plain types."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from megatron_irl.config.fields import check_field_names, wrong_type


def check_open_section(section: str, values: Mapping[str, Any], owner: type) -> None:
    """Refuse a key that ``owner`` has no field for, and words where it takes a number or a switch.

    Megatron's dataclasses take any value for any field, and fail where they use it, after the
    weights are read. What its annotations say of other types is left to Megatron.

    Args:
        section: Its name in the recipe.
        values: What the user gave.
        owner: Megatron's dataclass.

    Raises:
        UserError: For the first such key or value.
    """
    check_field_names(section, list(values), [field.name for field in dataclasses.fields(owner)])
    hints = get_type_hints(owner)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise wrong_type(f"{section}.{name}", value, _plain(hints[name])[0])


def _plain(annotation: Any) -> list[Any]:
    """The types that an annotation names, None left out."""
    named = (get_args(annotation) if get_origin(annotation) in (Union, types.UnionType)
             else (annotation,))
    return [each for each in named if each is not type(None)]


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a field of plain numbers or switches takes a value; any other field takes it."""
    expected = _plain(annotation)
    if value is None or not all(each in (bool, int, float) for each in expected):
        return True
    if isinstance(value, bool):
        return bool in expected
    if isinstance(value, int):  # 0 and 1 for a switch too
        return True
    return isinstance(value, float) and float in expected
