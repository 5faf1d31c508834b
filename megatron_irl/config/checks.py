"""Which values, and which combinations of them, make no sense: found before anything is built."""

import dataclasses
from collections.abc import Collection

from megatron_irl.algorithms.registry import rules_of
from megatron_irl.config.algorithm_keys import check_idle_keys
from megatron_irl.config.bounds import (
    check_at_least_one,
    check_not_negative,
    check_range,
    value_at,
)
from megatron_irl.config.files import paths_of
from megatron_irl.config.layout import check_layout
from megatron_irl.config.schema import (
    AdapterConfig,
    AlgorithmConfig,
    DataSource,
    ParallelConfig,
    Recipe,
)
from megatron_irl.errors import UserError

_OWNED_ELSEWHERE = {
    **{f.name: f"parallel.{f.name}" for f in dataclasses.fields(ParallelConfig)},
    "bf16": "precision", "fp16": "precision", "params_dtype": "precision",
}
_AT_LEAST_ONE = (
    "data.max_prompt_length", "data.max_response_length", "data.eval_limit", "algorithm.rounds",
    "algorithm.steps_per_round", "algorithm.prompts_per_round", "generation.max_new_tokens",
    "generation.max_requests", "generation.part_size", "evaluation.limit",
    "train.micro_batch_size", "train.micro_batch_tokens", "train.global_batch_size",
    "train.logprob_rows",
    "adapter.rank", "checkpoint.interval", "checkpoint.keep", "checkpoint.keep_every",
    "checkpoint.stop_before",
    "logging.interval",
    "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size", "parallel.data_parallel_size", "parallel.timeout_minutes",
)
_NOT_NEGATIVE = ("algorithm.nll_coefficient", "generation.temperature", "generation.top_k",
                 "checkpoint.stop_part_seconds", "train.max_skips", "parallel.hang_seconds",
                 "logging.samples", "seed")


def check_recipe(recipe: Recipe) -> None:
    """Refuse values and combinations that cannot run or would not do what they say.

    Pure; the layout is checked with ``parallel.data_parallel_size``. What needs the model is in
    ``check_layout_against_model``, what needs the hardware is refused by the platform.

    Raises:
        UserError: For the first problem found.
    """
    _check_bounds(recipe)
    _check_sources(recipe)
    check_idle_keys(recipe)
    _check_algorithm(recipe.algorithm)
    rules = rules_of(recipe.algorithm.name)
    rules.check(recipe)
    if recipe.data.turns == "all" and rules.reward != "none":
        raise UserError(f"data.turns=all conflicts with algorithm.name={recipe.algorithm.name}; "
                        "samples answer one turn, so each must be a record of its own. Set "
                        "data.turns to each or last, or algorithm.name to sft.")
    _check_preferences(recipe, rules.preferences)
    for section, names in (("model", recipe.model.overrides), ("optimizer", recipe.optimizer)):
        _check_owned_elsewhere(section, names)
    _check_precision(recipe)
    _check_adapter(recipe)
    check_layout(recipe)


def _check_bounds(recipe: Recipe) -> None:
    check_at_least_one(recipe, _AT_LEAST_ONE)
    check_not_negative(recipe, _NOT_NEGATIVE)
    check_range("generation.top_p", recipe.generation.top_p, "(0, 1]",
                 0 < recipe.generation.top_p <= 1)
    kv_cache_gb = recipe.generation.kv_cache_gb
    if kv_cache_gb is not None:
        check_range("generation.kv_cache_gb", kv_cache_gb, "(0, inf)", kv_cache_gb > 0)
    if isinstance(recipe.generation.cuda_graphs, int) and recipe.generation.cuda_graphs < 1:
        raise UserError(f"generation.cuda_graphs={recipe.generation.cuda_graphs} is no number of "
                        "graphs. Set it to auto, off, or 1 or more.")
    check_range("train.spike_factor", recipe.train.spike_factor, "(0, inf)",
                recipe.train.spike_factor > 0)
    minutes = recipe.checkpoint.interval_minutes
    if minutes is not None:
        check_range("checkpoint.interval_minutes", minutes, "(0, inf)", minutes > 0)
    check_range("schedule.lr_warmup_fraction", recipe.schedule.lr_warmup_fraction, "[0, 1)",
                 0 <= recipe.schedule.lr_warmup_fraction < 1)
    check_range("schedule.min_lr_ratio", recipe.schedule.min_lr_ratio, "[0, 1]",
                 0 <= recipe.schedule.min_lr_ratio <= 1)


def _check_sources(recipe: Recipe) -> None:
    data = recipe.data
    if data.overlong == "error" and data.bad_records == "drop":
        raise UserError("data.overlong=error conflicts with data.bad_records=drop; the one "
                        "refuses over-long records, the other leaves out what is refused. Set "
                        "data.overlong to drop, or remove data.bad_records.")
    if data.split is not None:
        check_range("data.split.eval", data.split.eval, "(0, 1)", 0 < data.split.eval < 1)
        if data.eval:
            raise UserError("data.split conflicts with data.eval; either evaluates on a share of "
                            "data.train, or on files of its own. Remove one of them.")
    keys = ["data.train", "data.eval", "data.eval_preferences"]
    if rules_of(recipe.algorithm.name).preferences:
        keys.append(str(rules_of(recipe.algorithm.name).preferences))
    for key in keys:
        sources = value_at(recipe, key)
        for each in sources:
            if not isinstance(each, DataSource):
                continue
            check_range(f"{key}: weight", each.weight, "(0, inf)", each.weight > 0)
            if each.limit is not None and each.limit < 1:
                raise UserError(f"{key}: limit={each.limit} of {each} is below 1; it counts "
                                "records. Set it to 1 or more, or remove the source.")
            if key != "data.train" and each.weight != 1:
                raise UserError(f"{key}: weight={each.weight} of {each}; only data.train has "
                                "weights. Remove it.")


def _check_algorithm(algorithm: AlgorithmConfig) -> None:
    for beta in algorithm.beta:
        if beta <= 0:
            raise UserError(f"algorithm.beta={beta} is not positive; it scales the reward, and "
                            "its sign is the direction of learning. Set algorithm.beta above 0.")
    if len(algorithm.beta) not in (1, algorithm.rounds):
        raise UserError(f"algorithm.beta={list(algorithm.beta)} has {len(algorithm.beta)} values "
                        f"and algorithm.rounds={algorithm.rounds}; a list has one beta per round. "
                        f"Set algorithm.beta to one number or to {algorithm.rounds}.")


def _check_preferences(recipe: Recipe, trained_on: str | None) -> None:
    """Refuse a preference file that is trained on and judged by."""
    if trained_on is None:
        return
    both = sorted(set(paths_of(value_at(recipe, trained_on)))
                  & set(paths_of(recipe.data.eval_preferences)))
    if both:
        raise UserError(f"{both[0]} stands in {trained_on} and in data.eval_preferences; the "
                        "second is for files the run never trains on. Remove it from one of them.")


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


def _check_adapter(recipe: Recipe) -> None:
    adapter, default = recipe.adapter, AdapterConfig()
    if adapter.generation != "merged" and recipe.generation.pipeline == "replicas":
        raise UserError(f"generation.pipeline=replicas conflicts with adapter.generation="
                        f"{adapter.generation}; a copy of the weights has no adapters. Set "
                        "adapter.generation to merged, or generation.pipeline to auto or stages.")
    check_range("adapter.dropout", adapter.dropout, "[0, 1)", 0 <= adapter.dropout < 1)
    if adapter.alpha is not None:
        check_range("adapter.alpha", adapter.alpha, "(0, inf)", adapter.alpha > 0)
    if not adapter.targets:
        raise UserError("adapter.targets names no layer. Set it to all-linear, or to the layers "
                        "that shall have adapters.")
    if not adapter.enabled:
        for field in dataclasses.fields(adapter):
            value = getattr(adapter, field.name)
            if value != getattr(default, field.name):
                raise UserError(f"adapter.{field.name}={value} does nothing without adapter.rank "
                                "or adapter.path. Set one of them, or remove the section.")
    if adapter.merge_each_round and recipe.algorithm.reset_optimizer != "round":
        raise UserError("adapter.merge_each_round=true conflicts with algorithm.reset_optimizer="
                        f"{recipe.algorithm.reset_optimizer}; the moments of merged adapters say "
                        "nothing about new ones. Set algorithm.reset_optimizer to round.")
