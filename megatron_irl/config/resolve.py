"""Derived values, the recipe as YAML again, and its fingerprint."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from megatron_irl.config.checks import (
    NOT_RFT_KEYS,
    PAIR_ONLY_KEYS,
    RFT_ONLY_KEYS,
    RFT_ONLY_SECTIONS,
)
from megatron_irl.config.schema import AlgorithmConfig, DataSource, Recipe
from megatron_irl.errors import UserError

# Sections and keys that change where, how fast or how closely watched a run is, not what it is.
_NOT_THE_EXPERIMENT = ("output_dir", "logging", "checkpoint", "evaluation", "parallel", "ddp",
                       "data.eval", "data.eval_limit", "data.eval_preferences",
                       "train.micro_batch_size", "train.logprob_chunk_size",
                       "generation.max_requests", "generation.kv_cache_gb")

# Keys that came later; left out of the fingerprint while they change nothing, so that runs begun
# without them go on.
_DATA_DEFAULTS = {"format": "auto", "fields": {}, "split": None, "bad_records": "error",
                  "chat_template_args": {}, "turns": "last"}

LINEAR_BOUND = 5.0  # of rft's linear reward loss, where the recipe gives none


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
    algorithm = recipe.algorithm
    steps, prompts = _round_size(recipe, num_demonstrations)
    if algorithm.name == "spin":
        _check_spin(algorithm, steps, prompts)
    algorithm = replace(algorithm, steps_per_round=steps)
    if algorithm.is_pairwise:
        beta = algorithm.beta * algorithm.rounds if len(algorithm.beta) == 1 else algorithm.beta
        reference = algorithm.reference or ("initial" if algorithm.name == "rft" else "round_start")
        algorithm = replace(algorithm, prompts_per_round=prompts, beta=beta, reference=reference)
    max_new_tokens = recipe.generation.max_new_tokens or recipe.data.max_response_length
    generation = replace(recipe.generation, max_new_tokens=max_new_tokens)
    reward = recipe.reward
    if reward.loss == "linear" and reward.bound is None:
        reward = replace(reward, bound=LINEAR_BOUND)
    return replace(recipe, algorithm=algorithm, generation=generation, reward=reward)


def to_yaml(recipe: Recipe, comments: Sequence[str] = ()) -> str:
    """Write a recipe as YAML that ``load_recipe`` reads back to the same recipe.

    Args:
        recipe: Resolved or not.
        comments: Lines put on top as YAML comments (versions, revision).
    """
    header = "".join(f"# {line}\n" for line in comments)
    return header + yaml.safe_dump(_to_mapping(recipe), sort_keys=False, allow_unicode=True)


def fingerprint(recipe: Recipe) -> str:
    """Name the experiment: 16 hex digits, equal when one run may continue the other.

    Left out are output folder, logging, checkpointing, evaluation, layout and memory settings, so
    that a run resumes under another layout. Paths count as written. Take it of the resolved
    recipe: one before and one after ``resolve`` differ.
    """
    mapping = _to_mapping(recipe)
    for path in _NOT_THE_EXPERIMENT:
        section, _, key = path.partition(".")
        if key:
            mapping[section].pop(key, None)
        else:
            mapping.pop(section)
    for key, value in _DATA_DEFAULTS.items():
        if mapping["data"].get(key) == value:  # as before there was such a key
            del mapping["data"][key]
    for each in mapping["data"]["train"]:
        if isinstance(each, dict):
            each["path"] = list(map(os.path.normpath, each["path"]))
    mapping["data"]["train"] = [os.path.normpath(each) if isinstance(each, str) else each
                                for each in mapping["data"]["train"]]
    mapping["model"]["hf"] = os.path.normpath(recipe.model.hf)
    text = json.dumps(mapping, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _round_size(recipe: Recipe, num_demonstrations: int) -> tuple[int, int]:
    """Steps and prompts of a round: what is given decides what is not."""
    algorithm, batch = recipe.algorithm, recipe.train.global_batch_size
    steps, prompts = algorithm.steps_per_round, algorithm.prompts_per_round
    if algorithm.name == "spin":
        return -(-num_demonstrations // batch), num_demonstrations
    if algorithm.name == "rft":
        samples = max(algorithm.reward_steps, algorithm.policy_steps) * batch
        steps = algorithm.reward_steps + algorithm.policy_steps
        return steps, prompts or -(-samples // recipe.policy.samples_per_prompt)
    if steps is None:
        prompts = prompts or num_demonstrations
        return -(-prompts // batch), prompts
    return steps, prompts or steps * batch


def _check_spin(algorithm: AlgorithmConfig, steps: int, prompts: int) -> None:
    derived = {"steps_per_round": steps, "prompts_per_round": prompts}
    for key, value in derived.items():
        given = getattr(algorithm, key)
        if given not in (None, value):
            raise UserError(f"algorithm.{key}={given} conflicts with algorithm.name=spin; a round "
                            f"of spin is one pass over the data, here {value}. Remove "
                            f"algorithm.{key}, or set algorithm.name to irft.")


def _to_mapping(recipe: Recipe) -> dict[str, Any]:
    """The nested mapping of the YAML file; keys that the algorithm does not have are left out."""
    mapping = dataclasses.asdict(recipe)
    mapping["model"] = {"hf": recipe.model.hf, **recipe.model.overrides}
    for key in ("train", "eval", "eval_preferences"):
        mapping["data"][key] = _written(getattr(recipe.data, key))
    mapping["algorithm"]["beta"] = list(recipe.algorithm.beta)
    mapping["reward"]["preferences"] = _written(recipe.reward.preferences)
    idle = list(NOT_RFT_KEYS)
    if recipe.algorithm.name != "rft":
        idle = [*RFT_ONLY_KEYS, *(() if recipe.algorithm.is_pairwise else PAIR_ONLY_KEYS)]
        for section in RFT_ONLY_SECTIONS:
            del mapping[section]
    for key in idle:
        del mapping["algorithm"][key]
    return mapping


def _written(sources: Sequence[str | DataSource]) -> list[Any]:
    """Sources as the recipe has them: a path, or a mapping of the keys that are set."""
    return [
        each if isinstance(each, str) else
        {"path": list(each.path)} | {
            f.name: getattr(each, f.name) for f in dataclasses.fields(each)
            if f.name != "path" and getattr(each, f.name) not in (f.default, {})}
        for each in sources
    ]
