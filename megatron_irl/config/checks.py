"""Which values, and which combinations of them, make no sense: found before anything is built."""

import dataclasses
from collections.abc import Collection
from typing import Any

from megatron_irl.config.layout import check_layout
from megatron_irl.config.schema import AlgorithmConfig, ParallelConfig, Recipe
from megatron_irl.errors import UserError

# Keys of ``algorithm`` that mean nothing without samples.
PAIR_ONLY_KEYS = ("prompts_per_round", "beta", "loss", "reference", "nll_coefficient",
                  "length_normalize", "mix_previous")
_OWNED_ELSEWHERE = {
    **{f.name: f"parallel.{f.name}" for f in dataclasses.fields(ParallelConfig)},
    "bf16": "precision", "fp16": "precision", "params_dtype": "precision",
}
_AT_LEAST_ONE = (
    "data.max_prompt_length", "data.max_response_length", "data.eval_limit", "algorithm.rounds",
    "algorithm.steps_per_round", "algorithm.prompts_per_round", "generation.max_new_tokens",
    "generation.max_requests", "generation.chunk_size", "evaluation.limit",
    "train.micro_batch_size", "train.global_batch_size", "train.logprob_chunk_size",
    "checkpoint.interval", "checkpoint.keep", "logging.interval",
    "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size", "parallel.data_parallel_size",
)
_NOT_NEGATIVE = ("algorithm.nll_coefficient", "generation.temperature", "generation.top_k",
                 "logging.samples", "seed")


def check_recipe(recipe: Recipe) -> None:
    """Refuse values and combinations that cannot run or would not do what they say.

    Pure; the layout is checked with ``parallel.data_parallel_size``. What needs the model is in
    ``check_layout_against_model``, what needs the hardware is refused by the platform.

    Raises:
        UserError: For the first problem found.
    """
    _check_bounds(recipe)
    _check_algorithm(recipe.algorithm)
    for section, names in (("model", recipe.model.overrides), ("optimizer", recipe.optimizer)):
        _check_owned_elsewhere(section, names)
    _check_precision(recipe)
    check_layout(recipe)


def check_given_keys(name: str, given: Collection[str]) -> None:
    """Refuse keys of ``algorithm`` that sft would ignore, even where they repeat the default.

    Raises:
        UserError: ``name`` is sft and a key about samples is given.
    """
    idle = [key for key in PAIR_ONLY_KEYS if key in given]
    if name == "sft" and idle:
        raise UserError(f"algorithm.{idle[0]} conflicts with algorithm.name=sft; sft draws no "
                        f"samples, so the key would do nothing. Remove algorithm.{idle[0]} or set "
                        "algorithm.name to irft or spin.")


def _value(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _check_bounds(recipe: Recipe) -> None:
    for path in _AT_LEAST_ONE:
        value = _value(recipe, path)
        if value is not None and value < 1:
            raise UserError(f"{path}={value} is below 1; it counts things. Set {path} to 1 or "
                            "more.")
    for path in _NOT_NEGATIVE:
        value = _value(recipe, path)
        if value < 0:
            raise UserError(f"{path}={value} is negative. Set {path} to 0 or more.")
    _check_range("generation.top_p", recipe.generation.top_p, "(0, 1]",
                 0 < recipe.generation.top_p <= 1)
    kv_cache_gb = recipe.generation.kv_cache_gb
    if kv_cache_gb is not None:
        _check_range("generation.kv_cache_gb", kv_cache_gb, "(0, inf)", kv_cache_gb > 0)
    _check_range("schedule.lr_warmup_fraction", recipe.schedule.lr_warmup_fraction, "[0, 1)",
                 0 <= recipe.schedule.lr_warmup_fraction < 1)
    _check_range("schedule.min_lr_ratio", recipe.schedule.min_lr_ratio, "[0, 1]",
                 0 <= recipe.schedule.min_lr_ratio <= 1)


def _check_range(path: str, value: float, interval: str, inside: bool) -> None:
    if not inside:
        raise UserError(f"{path}={value} is outside {interval}. Set {path} to a number in "
                        f"{interval}.")


def _check_algorithm(algorithm: AlgorithmConfig) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(AlgorithmConfig)}
    check_given_keys(algorithm.name, [key for key in PAIR_ONLY_KEYS
                                      if getattr(algorithm, key) != defaults[key]])
    if algorithm.name == "spin" and algorithm.reference == "initial":
        raise UserError("algorithm.reference=initial conflicts with algorithm.name=spin; spin's "
                        "opponent and reference are both the weights at the start of the pass. "
                        "Set algorithm.reference to round_start, or algorithm.name to irft.")
    if algorithm.name == "irft" and algorithm.mix_previous:
        raise UserError("algorithm.mix_previous=true conflicts with algorithm.name=irft; only "
                        "spin trains on the previous round's pairs. Set algorithm.mix_previous to "
                        "false, or algorithm.name to spin.")
    for beta in algorithm.beta:
        if beta <= 0:
            raise UserError(f"algorithm.beta={beta} is not positive; it scales the reward, and "
                            "its sign is the direction of learning. Set algorithm.beta above 0.")
    if len(algorithm.beta) not in (1, algorithm.rounds):
        raise UserError(f"algorithm.beta={list(algorithm.beta)} has {len(algorithm.beta)} values "
                        f"and algorithm.rounds={algorithm.rounds}; a list has one beta per round. "
                        f"Set algorithm.beta to one number or to {algorithm.rounds}.")


def _check_owned_elsewhere(section: str, names: Collection[str]) -> None:
    for name in names:
        if name in _OWNED_ELSEWHERE:
            raise UserError(f"{section}.{name} conflicts with {_OWNED_ELSEWHERE[name]}, which "
                            f"decides it. Remove {section}.{name} and set "
                            f"{_OWNED_ELSEWHERE[name]}.")


def _check_precision(recipe: Recipe) -> None:
    for name, value in recipe.model.overrides.items():
        if str(name).startswith("fp8") and recipe.precision != "fp8":
            raise UserError(f"model.{name}={value} conflicts with precision={recipe.precision}; "
                            f"FP8 settings act only under FP8. Remove model.{name} or set "
                            "precision to fp8.")
