"""From plain YAML values to the dataclasses: known keys, required keys, types."""

import dataclasses
import difflib
import math
import types
from collections.abc import Collection, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_irl.algorithms.registry import rules_of
from megatron_irl.config.algorithm_keys import (
    COMMON_KEYS,
    check_given_keys,
    own_keys,
    own_section_keys,
    own_sections,
)
from megatron_irl.config.aliases import ALIASES
from megatron_irl.config.schema import AlgorithmConfig, ModelConfig, Recipe
from megatron_irl.errors import UserError

_HINTS = {name: hint for name, hint in get_type_hints(Recipe).items() if name != "sections"}
SECTIONS: dict[str, type[Any]] = {
    name: hint for name, hint in _HINTS.items()
    if isinstance(hint, type) and dataclasses.is_dataclass(hint)}
OPEN_SECTIONS = ("optimizer", "ddp")
# Fields that hold what has no field of its own are no keys.
_HOLDERS = {(ModelConfig, "overrides"), (AlgorithmConfig, "options")}


def top_level() -> tuple[str, ...]:
    """Every key at the top of a recipe, whatever the algorithm."""
    return (*_HINTS, *own_sections())


def mapping_sections() -> tuple[str, ...]:
    """Those that hold keys."""
    return (*SECTIONS, *OPEN_SECTIONS, *own_sections())


def section_keys() -> dict[str, tuple[str, ...]]:
    """Keys of every section, whatever the algorithm; open sections have too many to list."""
    keys = {
        name: tuple(f.name for f in dataclasses.fields(cls) if (cls, f.name) not in _HOLDERS)
        for name, cls in SECTIONS.items()
    }
    keys["algorithm"] += tuple(own_keys())
    return keys | {name: own_section_keys(name) for name in own_sections()}

def recipe_from_mapping(mapping: Mapping[str, Any]) -> Recipe:
    """Build a recipe from the nested mapping a YAML file holds; no cross-field checks, no files.

    Raises:
        UserError: Unknown key (with the nearest match), missing required key, wrong type, a key
            that the algorithm does not read.
    """
    _check_keys(mapping)
    _check_required(mapping)
    rules = rules_of(coerce(mapping["algorithm"]["name"], str, "algorithm.name"))
    check_given_keys(rules.name, mapping)
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        if name in OPEN_SECTIONS:
            values[name] = dict(value or {})
        elif name == "algorithm":
            common = {k: v for k, v in value.items() if k in COMMON_KEYS}
            own = {k: v for k, v in value.items() if k not in COMMON_KEYS}
            options = _build_section(name, own, rules.options) if rules.options else None
            values[name] = dataclasses.replace(
                _build_section(name, common, AlgorithmConfig), options=options)
        elif name in SECTIONS:
            values[name] = _build_section(name, value or {}, SECTIONS[name])
        elif name not in own_sections():
            values[name] = coerce(value, _HINTS[name], name)
    values["sections"] = {
        name: _build_section(name, mapping.get(name) or {}, cls)
        for name, cls in rules.sections.items()
    }
    return Recipe(**values)


def check_field_names(section: str, names: Collection[str], allowed: Collection[str]) -> None:
    """Refuse a key of ``section`` that is not among ``allowed``, naming the nearest match.

    Args:
        section: Prefix for the message; empty for the top level.
        names: Keys the user gave.
        allowed: Keys there are.

    Raises:
        UserError: For the first unknown name, in sorted order.
    """
    for name in sorted(names, key=str):
        if name not in allowed:
            dotted = f"{section}.{name}" if section else name
            raise UserError(f"unknown key {dotted}{_hint(section, str(name), allowed)}")


def coerce(value: Any, annotation: Any, path: str) -> Any:
    """Convert one YAML value to the type of its field.

    Numeric strings are taken where a float is expected (YAML 1.1 reads ``1e-5`` as a string), a
    single value where a tuple is expected, and an integer where a float is. Nothing else is
    converted, so that a misplaced value is refused rather than guessed at.

    Raises:
        UserError: The value does not fit; the message names path, value and expected type.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [arg for arg in args if arg is not type(None)]
        # Of a value and a mapping of keys, or of words and a number, what is written decides.
        nested = [arg for arg in inner if dataclasses.is_dataclass(arg)]
        plain = [arg for arg in inner if arg not in nested]
        is_nested = isinstance(value, Mapping) or dataclasses.is_dataclass(value) or not plain
        if nested and is_nested:
            return coerce(value, nested[0], path)
        if len(plain) > 1:
            words, number = sorted(plain, key=lambda arg: get_origin(arg) is not Literal)
            is_number = isinstance(value, int) and not isinstance(value, bool)
            return coerce(value, number if is_number else words, path)
        return coerce(value, plain[0], path)
    if origin is tuple:
        if value is None and args[0] is not float:
            return ()
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(coerce(item, args[0], path) for item in items)
    if origin is dict:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r} is {_describe(value)}; {path} takes a mapping, as "
                            f"in {path}={{key: value}}.")
        return {coerce(key, args[0], path): coerce(item, args[1], f"{path}.{key}")
                for key, item in value.items()}
    if annotation is Any:
        return value
    if dataclasses.is_dataclass(annotation):
        return _to_dataclass(value, annotation, path)
    if origin is Literal:
        if isinstance(value, bool):  # YAML 1.1 reads ``off`` and ``true`` so
            spelled = ("true", "on") if value else ("false", "off")
            value = next((word for word in spelled if word in args), value)
        if value in args:
            return value
        raise UserError(f"{path}={value} is not one of {', '.join(args)}; "
                        f"set {path} to one of them.")
    if annotation is float:
        return _to_float(value, path)
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        raise wrong_type(path, value, annotation)
    return value


def _to_dataclass(value: Any, cls: Any, path: str) -> Any:
    """A mapping inside a section, such as an entry of ``data.train``."""
    if isinstance(value, cls):
        return value
    keys = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(value, Mapping):
        raise UserError(f"{path}={value!r} is {_describe(value)}; {path} takes a mapping with "
                        f"{', '.join(keys)}.")
    check_field_names(path, list(value), list(keys))
    hints = get_type_hints(cls)
    known = {key: coerce(item, hints[key], f"{path}.{key}") for key, item in value.items()}
    for name, each in keys.items():
        required = (each.default is dataclasses.MISSING
                    and each.default_factory is dataclasses.MISSING)
        if required and not known.get(name):
            raise UserError(f"{path} has no {name}; every entry needs one. Set {path}.{name}.")
    return cls(**known)


def _to_float(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong_type(path, value, float)
    try:
        number = float(value)
    except ValueError:
        raise wrong_type(path, value, float) from None
    if not math.isfinite(number):
        raise UserError(f"{path}={value} is not finite; set {path} to an ordinary number.")
    return number


def wrong_type(path: str, value: Any, expected: type) -> UserError:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    advice = " Put it in quotes if it is meant." if expected is str and value is not None else ""
    return UserError(f"{path}={value!r} is {_describe(value)}; {path} takes {names[expected]}."
                     f"{advice}")


def _describe(value: Any) -> str:
    known = {type(None): "empty", bool: "a boolean", int: "an integer", float: "a number",
             str: "a string", list: "a list", dict: "a mapping"}
    return known.get(type(value), f"a {type(value).__name__}")


def _build_section(section: str, value: Mapping[str, Any], cls: type[Any]) -> Any:
    hints = get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls) if (cls, f.name) not in _HOLDERS}
    known = {key: coerce(item, hints[key], f"{section}.{key}")
             for key, item in value.items() if key in names}
    if cls is ModelConfig:
        known["overrides"] = {k: v for k, v in value.items() if k not in known}
    return cls(**known)


def _check_keys(mapping: Mapping[str, Any]) -> None:
    check_field_names("", mapping, top_level())
    for name, value in mapping.items():
        if name not in mapping_sections() or value is None:
            continue
        if not isinstance(value, Mapping):
            raise UserError(f"{name}={value!r} is {_describe(value)}; {name} is a section. "
                            f"Set its keys, as in {name}.key={value}.")
        if name not in OPEN_SECTIONS and name != "model":
            check_field_names(name, value, section_keys()[name])


def _check_required(mapping: Mapping[str, Any]) -> None:
    required = {"model": "hf", "data": "train", "algorithm": "name"}
    missing = [f"{section}.{key}" for section, key in required.items()
               if (mapping.get(section) or {}).get(key) in (None, "", [])]
    if mapping.get("output_dir") in (None, ""):
        missing.append("output_dir")
    if missing:
        raise UserError(f"{', '.join(missing)}: missing; every recipe needs model.hf, data.train, "
                        f"algorithm.name and output_dir. Set {' and '.join(missing)}.")


def _hint(section: str, name: str, allowed: Collection[str]) -> str:
    """End an unknown-key message: the nearest key, the same key elsewhere, or all there are."""
    prefix = f"{section}." if section else ""
    alias = ALIASES.get(f"{prefix}{name}") or ALIASES.get(name)
    if alias and alias != f"{prefix}{name}":
        return f"; did you mean {alias}?"
    elsewhere = [f"{other}.{name}" for other, keys in section_keys().items()
                 if name in keys and other != section]
    if name in top_level():
        elsewhere.append(name)
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    near = difflib.get_close_matches(name, [str(a) for a in allowed], n=1)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    keys = {key: other for other, keys in section_keys().items() for key in keys}
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.8)
    if near:
        return f"; did you mean {keys[near[0]]}.{near[0]}?"
    if len(allowed) <= 20:
        return f"; known keys are {', '.join(prefix + str(a) for a in sorted(allowed))}."
    return f"; nothing near it among the {len(allowed)} known keys."
