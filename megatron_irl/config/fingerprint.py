"""Whether one run may continue another: what makes two recipes the same experiment."""

import dataclasses
import hashlib
import json
import os
from typing import Any

from megatron_irl.config.former import FORMER, KEY
from megatron_irl.config.renamed import BEFORE
from megatron_irl.config.resolve import to_mapping
from megatron_irl.config.schema import Recipe

# Sections and keys that change where, how fast or how closely watched a run is, not what it is.
NOT_THE_EXPERIMENT = (
    "output_dir", "logging", "profile", "checkpoint", "evaluation", "parallel", "ddp", "data.eval",
    "data.eval_limit", "data.eval_preferences", "train.micro_batch_size",
    "train.micro_batch_tokens", "train.share_prompts", "train.logprob_rows",
    "train.on_nonfinite", "train.max_skips", "train.on_spike", "train.spike_factor",
    "train.on_collapse", "generation.max_requests",
    "generation.kv_cache_gb", "generation.cuda_graphs", "generation.keep_cache",
    "generation.share_prompts", "adapter.generation", "generation.offload_optimizer",
    "generation.pipeline",
)


def fingerprint(recipe: Recipe) -> str:
    """Name the experiment: 16 hex digits, equal when one run may continue the other.

    Only values that differ from their defaults count, so that a version with more keys gives a run
    begun before it the same name (of a default that was changed since, the former one). Left out
    are output folder, logging, checkpointing, evaluation, layout and memory settings, so that a run
    resumes under another layout. Paths count as written. Take it of the resolved recipe: one before
    and one after ``resolve`` differ.
    """
    given = _flat(_non_defaults(recipe))
    values = {BEFORE.get(key, key): value for key, value in _experiment(recipe).items()
              if key in given and (key, value) != (KEY, FORMER)}
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(known: Recipe, now: Recipe) -> list[str]:
    """What keeps ``now`` from continuing ``known``, as ``key=value there and value now``.

    Both resolved, and read by this version: a key that the version of ``known`` did not have has
    its default in it.
    """
    before, after = _experiment(known), _experiment(now)
    return [
        f"{key}={_shown(before, key)} there and {_shown(after, key)} now"
        for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)
    ]


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], default=str) if key in values else "(not set)"


def _experiment(recipe: Recipe) -> dict[str, Any]:
    """The values that make the experiment, by dotted key."""
    mapping = to_mapping(recipe)
    for path in NOT_THE_EXPERIMENT:
        section, _, key = path.partition(".")
        if key:
            mapping[section].pop(key, None)
        else:
            mapping.pop(section)
    mapping["data"]["train"] = _normal(mapping["data"]["train"])
    mapping["model"]["hf"] = os.path.normpath(recipe.model.hf)
    return _flat(mapping)


def _normal(paths: Any) -> Any:
    """Paths in one spelling; a source may be a mapping with a ``path``."""
    if isinstance(paths, str):
        return os.path.normpath(paths)
    if isinstance(paths, dict):
        return {k: _normal(v) if k == "path" else v for k, v in paths.items()}
    return [_normal(path) for path in paths]


def _flat(mapping: dict[str, Any]) -> dict[str, Any]:
    """``{"section.key": value}`` for the keys of sections; deeper values stay whole."""
    flat: dict[str, Any] = {}
    for section, value in mapping.items():
        if isinstance(value, dict):
            flat |= {f"{section}.{key}": inner for key, inner in value.items()}
        else:
            flat[section] = value
    return flat


def _non_defaults(recipe: Recipe) -> dict[str, Any]:
    """The keys of ``to_mapping`` whose value is not the default of its field, by section."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if dataclasses.is_dataclass(value):
            found[f.name] = _set_fields(value)
        elif f.name == "sections":  # of the algorithm, named in ``to_mapping`` as they are
            found |= {name: _set_fields(section) for name, section in value.items()}
        elif value != _default(f):
            found[f.name] = value
    found["model"] = found.get("model", {}) | recipe.model.overrides
    options = found["algorithm"].pop("options", None)
    if options is not None:
        found["algorithm"] |= _set_fields(recipe.algorithm.options)
    return found


def _set_fields(section: Any) -> dict[str, Any]:
    if isinstance(section, dict):
        return section
    return {
        f.name: getattr(section, f.name) for f in dataclasses.fields(section)
        if getattr(section, f.name) != _default(f)
    }


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default  # MISSING equals no value
