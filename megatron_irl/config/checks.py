"""Which values, and which combinations of them, make no sense: found before anything is built."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from megatron_irl.config.files import paths_of
from megatron_irl.config.layout import check_layout
from megatron_irl.config.schema import AlgorithmConfig, DataSource, ParallelConfig, Recipe
from megatron_irl.errors import UserError

# Keys of ``algorithm`` that mean nothing without samples.
PAIR_ONLY_KEYS = ("prompts_per_round", "beta", "loss", "reference", "nll_coefficient",
                  "length_normalize", "mix_previous")
# Keys of ``algorithm`` and sections that mean something to rft alone, and those it does not read.
RFT_ONLY_KEYS = ("reward_steps", "policy_steps")
RFT_ONLY_SECTIONS = ("reward", "policy")
NOT_RFT_KEYS = {
    "steps_per_round": "a round of rft has algorithm.reward_steps and algorithm.policy_steps",
    "loss": "the explicit reward has reward.loss",
    "length_normalize": "it normalizes the implicit reward",
    "mix_previous": "earlier rounds' samples are mixed in by reward.mix_rounds",
}
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
    "parallel.context_parallel_size", "parallel.data_parallel_size", "algorithm.reward_steps",
)
_NOT_NEGATIVE = ("algorithm.nll_coefficient", "generation.temperature", "generation.top_k",
                 "logging.samples", "seed", "algorithm.policy_steps", "reward.lr",
                 "reward.trunk_scale", "reward.mix_rounds", "reward.preference_weight")


def check_recipe(recipe: Recipe) -> None:
    """Refuse values and combinations that cannot run or would not do what they say.

    Pure; the layout is checked with ``parallel.data_parallel_size``. What needs the model is in
    ``check_layout_against_model``, what needs the hardware is refused by the platform.

    Raises:
        UserError: For the first problem found.
    """
    _check_bounds(recipe)
    _check_sources(recipe)
    _check_idle_keys(recipe)
    _check_algorithm(recipe.algorithm)
    if recipe.data.turns == "all" and recipe.algorithm.name != "sft":
        raise UserError(f"data.turns=all conflicts with algorithm.name={recipe.algorithm.name}; "
                        "samples answer one turn, so each must be a record of its own. Set "
                        "data.turns to each or last, or algorithm.name to sft.")
    if recipe.algorithm.name == "rft":
        _check_reward(recipe)
    for section, names in (("model", recipe.model.overrides), ("optimizer", recipe.optimizer)):
        _check_owned_elsewhere(section, names)
    _check_precision(recipe)
    check_layout(recipe)


def check_given_keys(algorithm: str, given: Mapping[str, Any]) -> None:
    """Refuse keys that the algorithm would ignore, even where they repeat the default.

    Args:
        algorithm: ``algorithm.name``.
        given: The recipe's mapping as written.

    Raises:
        UserError: sft with a key about samples, rft with a key of another algorithm's loss, or
            another algorithm with a key of rft.
    """
    keys = given["algorithm"]
    idle = [key for key in PAIR_ONLY_KEYS if key in keys]
    if algorithm == "sft" and idle:
        raise UserError(f"algorithm.{idle[0]} conflicts with algorithm.name=sft; sft draws no "
                        f"samples, so the key would do nothing. Remove algorithm.{idle[0]} or set "
                        "algorithm.name to irft or spin.")
    if algorithm == "rft":
        for key, reason in NOT_RFT_KEYS.items():
            if key in keys:
                raise UserError(f"algorithm.{key} conflicts with algorithm.name=rft; {reason}. "
                                f"Remove algorithm.{key}.")
        return
    idle = [f"algorithm.{key}" for key in RFT_ONLY_KEYS if key in keys]
    idle += [f"{name}.{key}" for name in RFT_ONLY_SECTIONS for key in given.get(name) or {}]
    if idle:
        raise UserError(f"{idle[0]} conflicts with algorithm.name={algorithm}; only rft has an "
                        "explicit reward and policy steps, so the key would do nothing. Remove "
                        f"{idle[0]} or set algorithm.name to rft.")


def given_keys(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The keys whose values differ from the defaults, as ``check_given_keys`` takes them."""
    sections = {"algorithm": recipe.algorithm, "reward": recipe.reward, "policy": recipe.policy}
    return {
        name: {f.name: getattr(section, f.name) for f in dataclasses.fields(section)
               if getattr(section, f.name) != f.default}
        for name, section in sections.items()
    }


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


def _check_sources(recipe: Recipe) -> None:
    data = recipe.data
    if data.overlong == "error" and data.bad_records == "drop":
        raise UserError("data.overlong=error conflicts with data.bad_records=drop; the one "
                        "refuses over-long records, the other leaves out what is refused. Set "
                        "data.overlong to drop, or remove data.bad_records.")
    if data.split is not None:
        _check_range("data.split.eval", data.split.eval, "(0, 1)", 0 < data.split.eval < 1)
        if data.eval:
            raise UserError("data.split conflicts with data.eval; either evaluates on a share of "
                            "data.train, or on files of its own. Remove one of them.")
    keys = {"data.train": data.train, "data.eval": data.eval,
            "data.eval_preferences": data.eval_preferences,
            "reward.preferences": recipe.reward.preferences}
    for key, sources in keys.items():
        for each in sources:
            if not isinstance(each, DataSource):
                continue
            _check_range(f"{key}: weight", each.weight, "(0, inf)", each.weight > 0)
            if each.limit is not None and each.limit < 1:
                raise UserError(f"{key}: limit={each.limit} of {each} is below 1; it counts "
                                "records. Set it to 1 or more, or remove the source.")
            if key != "data.train" and each.weight != 1:
                raise UserError(f"{key}: weight={each.weight} of {each}; only data.train has "
                                "weights. Remove it.")


def _check_algorithm(algorithm: AlgorithmConfig) -> None:
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


def _check_idle_keys(recipe: Recipe) -> None:
    given = given_keys(recipe)
    if recipe.algorithm.name == "rft":
        given["algorithm"].pop("steps_per_round", None)  # filled by ``resolve``
    check_given_keys(recipe.algorithm.name, given)
    if recipe.algorithm.name == "sft" and recipe.data.eval_preferences:
        raise UserError("data.eval_preferences conflicts with algorithm.name=sft; sft learns no "
                        "reward. Remove data.eval_preferences, or set algorithm.name to irft, "
                        "spin or rft.")


def _check_reward(recipe: Recipe) -> None:
    reward, policy = recipe.reward, recipe.policy
    if policy.samples_per_prompt < 2:
        raise UserError(f"policy.samples_per_prompt={policy.samples_per_prompt} is below 2; a "
                        "sample's baseline is the mean of the others. Set "
                        "policy.samples_per_prompt to 2 or more.")
    if recipe.generation.temperature == 0:
        raise UserError("generation.temperature=0.0 conflicts with algorithm.name=rft; the samples "
                        "of a prompt would all be the same. Set generation.temperature above 0 "
                        "(the theory's is 1).")
    _check_range("policy.clip_low", policy.clip_low, "(0, 1]", 0 < policy.clip_low <= 1)
    _check_range("policy.clip_high", policy.clip_high, "(0, inf)", policy.clip_high > 0)
    if reward.bound is not None:
        _check_range("reward.bound", reward.bound, "(0, inf)", reward.bound > 0)
        if reward.loss == "logistic":
            raise UserError(f"reward.bound={reward.bound} conflicts with reward.loss=logistic, "
                            "which flattens out by itself. Remove reward.bound, or set reward.loss "
                            "to linear.")
    if reward.trunk == "detached" and reward.trunk_scale != 1:
        raise UserError(f"reward.trunk_scale={reward.trunk_scale} conflicts with "
                        "reward.trunk=detached; no gradient goes into the backbone. Remove "
                        "reward.trunk_scale, or set reward.trunk to joint.")
    if not reward.preferences and reward.preference_weight != 1:
        raise UserError(f"reward.preference_weight={reward.preference_weight} weighs a stream that "
                        "is not there. Set reward.preferences to files, or remove "
                        "reward.preference_weight.")
    both = sorted(set(paths_of(reward.preferences)) & set(paths_of(recipe.data.eval_preferences)))
    if both:
        raise UserError(f"{both[0]} stands in reward.preferences and in data.eval_preferences; the "
                        "second is for files the run never trains on. Remove it from one of them.")
    if recipe.ddp.get("overlap_grad_reduce") or recipe.ddp.get("overlap_param_gather"):
        raise UserError("ddp.overlap_grad_reduce conflicts with algorithm.name=rft; a reward step "
                        "has no gradient for the language-model head nor a policy step for the "
                        "reward head, and Megatron's overlapped reduction waits for every "
                        "gradient. Remove ddp.overlap_grad_reduce and ddp.overlap_param_gather.")


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
