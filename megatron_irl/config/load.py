"""Read a recipe: YAML file, dotted overrides, file patterns."""

import dataclasses
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_irl.config.checks import check_recipe
from megatron_irl.config.fields import (
    check_field_names,
    mapping_sections,
    recipe_from_mapping,
    top_level,
)
from megatron_irl.config.files import expand_files, expand_home
from megatron_irl.config.hub_cache import hub_snapshot
from megatron_irl.config.renamed import NOW, with_names_of_now
from megatron_irl.config.schema import Recipe
from megatron_irl.errors import UserError


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file of nested sections.
        overrides: ``section.key=value`` each, the value read as YAML; later ones win.
        check_files: Expand the patterns of ``data`` and ``reward`` and require the files; False
            keeps the patterns, for checking a recipe away from its data.

    Returns:
        The recipe as written, with values still to be derived as None (see ``resolve``).

    A run's own ``recipe.yaml`` is read as well: its ``environment`` block, the record of how the
    run came about, is left out.

    Example:
        recipe = load_recipe("recipe.yaml", ["optimizer.lr=1e-6", "algorithm.rounds=3"])

    Raises:
        UserError: Anything wrong with the file, a key, a value or a combination of values.
    """
    mapping = _read_yaml(Path(path))
    mapping.pop("environment", None)
    mapping = with_names_of_now(mapping)
    for override in overrides:
        _apply_override(mapping, override)
    recipe = _in_hub_cache(expand_home(recipe_from_mapping(mapping)))
    if check_files:
        recipe = expand_files(recipe)
    check_recipe(recipe)  # after the files: two patterns may have met in one of them
    return recipe


def _in_hub_cache(recipe: Recipe) -> Recipe:
    """Name the snapshot where a repository of the Hugging Face cache is given: it stays the same
    though a newer revision be fetched while a run goes on.
    """
    tokenizer = recipe.data.tokenizer
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, hf=str(hub_snapshot(recipe.model.hf))),
        data=dataclasses.replace(
            recipe.data, tokenizer=str(hub_snapshot(tokenizer)) if tokenizer else tokenizer
        ),
    )


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's numbers (``1e-5`` is a float) and without silent duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where} is not YAML{line}: {reason}.") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"recipe {path} does not exist; the working directory is "
                        f"{Path.cwd()}. Give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}.") from None
    mapping = _parse(text, f"recipe {path}")
    if not isinstance(mapping, dict):
        raise UserError(f"recipe {path} is not a mapping; it holds sections such as model:, "
                        "data: and algorithm:. Write it as 'section:' with 'key: value' below.")
    return mapping


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    dotted = NOW.get(dotted, dotted)
    if not equals or not dotted:
        raise UserError(f"override {override!r} has no value; an override is section.key=value. "
                        "Write it with = and without spaces around it.")
    value = _parse(text, f"the value of override {override!r}")
    section, dot, key = dotted.partition(".")
    check_field_names("", [section], top_level())
    if not dot:
        if section in mapping_sections():
            raise UserError(f"override {override!r} names a section; {section} holds keys. "
                            f"Override one of them, as in {section}.key=value.")
        mapping[section] = value
        return
    if section not in mapping_sections():
        raise UserError(f"override {override!r} names {dotted}, but {section} is a single value. "
                        f"Write {section}=value.")
    current = mapping.get(section)
    if current is not None and not isinstance(current, Mapping):
        raise UserError(f"{section}={current!r} is not a mapping; override {override!r} needs the "
                        f"section {section}. Write it as a section in the recipe.")
    mapping[section] = _with_key(current or {}, key, value)


def _with_key(mapping: Mapping[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """The mapping with a key set; a key with dots goes into mappings inside it."""
    key, dot, rest = dotted.partition(".")
    if dot:
        inner = mapping.get(key)
        value = _with_key(inner if isinstance(inner, Mapping) else {}, rest, value)
    return {**mapping, key: value}
