"""Combinations that cannot run, one at a time from a recipe that can."""

import pytest

from megatron_irl.config import Recipe, check_recipe, recipe_from_mapping
from megatron_irl.config.algorithm_keys import check_given_keys
from megatron_irl.errors import UserError


def recipe_with(changes: dict[str, object], name: str = "irft") -> Recipe:
    mapping: dict = {"model": {"hf": "m"}, "data": {"train": "d"}, "algorithm": {"name": name},
                     "output_dir": "o"}
    for path, value in changes.items():
        section, _, key = path.partition(".")
        if key:
            mapping.setdefault(section, {})[key] = value
        else:
            mapping[section] = value
    return recipe_from_mapping(mapping)


@pytest.mark.parametrize("name", ["sft", "irft", "spin", "rft"])
def test_the_base_recipe_passes(name: str):
    check_recipe(recipe_with({}, name))


@pytest.mark.parametrize("changes", [
    {"generation.temperature": 0.0}, {"generation.top_p": 1.0}, {"algorithm.nll_coefficient": 0},
    {"algorithm.rounds": 2, "algorithm.beta": [0.1, 5.0]}, {"algorithm.reference": "initial"},
    {"precision": "fp8", "model.fp8_recipe": "delayed"}, {"logging.samples": 0},
    {"train.micro_batch_size": 2, "parallel.data_parallel_size": 4}, {"schedule.min_lr_ratio": 1},
])
def test_edges_that_are_allowed(changes: dict):
    check_recipe(recipe_with(changes))


@pytest.mark.parametrize(("changes", "words"), [
    ({"algorithm.beta": 0}, ["algorithm.beta=0.0", "above 0"]),
    ({"algorithm.beta": [0.1, -1], "algorithm.rounds": 2}, ["algorithm.beta=-1.0"]),
    ({"algorithm.beta": [0.1, 0.2], "algorithm.rounds": 3}, ["2 values", "algorithm.rounds=3"]),
    ({"algorithm.beta": [], "algorithm.rounds": 3}, ["0 values", "algorithm.rounds=3"]),
    ({"algorithm.rounds": 0}, ["algorithm.rounds=0", "1 or more"]),
    ({"algorithm.steps_per_round": 0}, ["algorithm.steps_per_round=0"]),
    ({"algorithm.nll_coefficient": -0.1}, ["algorithm.nll_coefficient=-0.1", "negative"]),
    ({"algorithm.mix_previous": True}, ["mix_previous=true", "algorithm.name=irft"]),
    ({"generation.temperature": -1}, ["generation.temperature=-1.0"]),
    ({"generation.top_p": 0}, ["generation.top_p=0.0", "(0, 1]"]),
    ({"generation.top_p": 1.1}, ["generation.top_p=1.1", "(0, 1]"]),
    ({"generation.kv_cache_gb": 0}, ["generation.kv_cache_gb=0.0"]),
    ({"generation.max_new_tokens": 0}, ["generation.max_new_tokens=0"]),
    ({"generation.pipeline": "replicas", "adapter.rank": 4, "adapter.generation": "applied"},
     ["generation.pipeline=replicas", "adapter.generation=applied", "auto or stages"]),
    ({"data.max_prompt_length": 0}, ["data.max_prompt_length=0"]),
    ({"train.micro_batch_size": -1}, ["train.micro_batch_size=-1"]),
    ({"train.global_batch_size": 0}, ["train.global_batch_size=0"]),
    ({"checkpoint.keep": 0}, ["checkpoint.keep=0"]),
    ({"checkpoint.interval": 0}, ["checkpoint.interval=0"]),
    ({"schedule.lr_warmup_fraction": 1.0}, ["schedule.lr_warmup_fraction=1.0", "[0, 1)"]),
    ({"schedule.min_lr_ratio": 2}, ["schedule.min_lr_ratio=2.0"]),
    ({"seed": -1}, ["seed=-1"]),
    ({"parallel.context_parallel_size": 0}, ["parallel.context_parallel_size=0"]),
    ({"model.bf16": True}, ["model.bf16", "precision"]),
    ({"optimizer.params_dtype": "x"}, ["optimizer.params_dtype", "precision"]),
    ({"model.tensor_model_parallel_size": 2}, ["model.tensor", "parallel.tensor"]),
    ({"model.fp8_recipe": "delayed"}, ["model.fp8_recipe=delayed", "precision=bf16"]),
    ({"train.global_batch_size": 9, "parallel.data_parallel_size": 2},
     ["train.global_batch_size=9", "data_parallel_size=2", "8 or 10"]),
])
def test_refused(changes: dict, words: list[str]):
    with pytest.raises(UserError) as caught:
        check_recipe(recipe_with(changes))
    for word in words:
        assert word in str(caught.value)


def test_spin_has_no_initial_reference():
    with pytest.raises(UserError, match="reference=initial conflicts with algorithm.name=spin"):
        check_recipe(recipe_with({"algorithm.reference": "initial"}, "spin"))


@pytest.mark.parametrize(("key", "value"), [
    ("beta", 0.5), ("loss", "hinge"), ("reference", "initial"), ("nll_coefficient", 0.1),
    ("length_normalize", True), ("mix_previous", True), ("prompts_per_round", 8)])
def test_sft_refuses_keys_about_samples(key: str, value: object):
    with pytest.raises(UserError, match=f"algorithm.{key} conflicts with algorithm.name=sft"):
        check_recipe(recipe_with({f"algorithm.{key}": value}, "sft"))


@pytest.mark.parametrize(("changes", "words"), [
    ({"label_smoothing": 1.0}, ["algorithm.label_smoothing=1.0", "[0, 1)"]),
    ({"label_smoothing": -0.1}, ["algorithm.label_smoothing=-0.1", "[0, 1)"]),
    ({"label_smoothing": 0.1, "token_weight": "probability"},
     ["label_smoothing=0.1 conflicts with algorithm.token_weight=probability", "Remove one"]),
])
def test_smoothing_that_cannot_run(changes: dict, words: list[str]):
    with pytest.raises(UserError) as caught:
        check_recipe(recipe_with({f"algorithm.{k}": v for k, v in changes.items()}, "sft"))
    for word in words:
        assert word in str(caught.value)
    check_recipe(recipe_with({"algorithm.label_smoothing": 0.1}, "sft"))
    with pytest.raises(UserError, match="label_smoothing conflicts with algorithm.name=irft"):
        check_given_keys("irft", {"algorithm": {"label_smoothing": 0.0}})


def test_sft_refuses_them_even_at_their_default():
    with pytest.raises(UserError, match="algorithm.beta conflicts with algorithm.name=sft"):
        check_given_keys("sft", {"algorithm": {"name": "sft", "beta": 0.1}})
    check_given_keys("irft", {"algorithm": {"name": "irft", "beta": 0.1}})


@pytest.mark.parametrize("name", ["sft", "irft", "spin"])
@pytest.mark.parametrize(("key", "value"), [
    ("algorithm.reward_steps", 3), ("algorithm.policy_steps", 0), ("reward.lr", 1e-3),
    ("reward.trunk", "detached"), ("reward.preferences", ["p.jsonl"]), ("policy.clip_low", 0.1)])
def test_reward_keys_are_for_rft(name: str, key: str, value: object):
    with pytest.raises(UserError, match=f"{key} conflicts with algorithm.name={name}"):
        check_recipe(recipe_with({key: value}, name))
    check_recipe(recipe_with({key: value}, "rft"))


def test_reward_keys_are_for_rft_even_at_their_default():
    with pytest.raises(UserError, match="reward.loss conflicts with algorithm.name=irft"):
        check_given_keys("irft", {"algorithm": {}, "reward": {"loss": "logistic"}})
    with pytest.raises(UserError, match="algorithm.policy_steps conflicts"):
        check_given_keys("sft", {"algorithm": {"policy_steps": 8}})
    check_given_keys("irft", {"algorithm": {}, "reward": None})


@pytest.mark.parametrize(("key", "value"), [
    ("steps_per_round", 4), ("loss", "hinge"), ("length_normalize", True), ("mix_previous", True)])
def test_rft_refuses_keys_of_the_implicit_reward(key: str, value: object):
    with pytest.raises(UserError, match=f"algorithm.{key} conflicts with algorithm.name=rft"):
        check_given_keys("rft", {"algorithm": {key: value}})
    if key != "steps_per_round":  # a resolved recipe has it
        with pytest.raises(UserError, match=f"algorithm.{key} conflicts"):
            check_recipe(recipe_with({f"algorithm.{key}": value}, "rft"))


@pytest.mark.parametrize(("changes", "words"), [
    ({"policy.samples_per_prompt": 1}, ["policy.samples_per_prompt=1", "2 or more"]),
    ({"generation.temperature": 0}, ["generation.temperature=0.0", "rft", "above 0"]),
    ({"policy.clip_low": 1.5}, ["policy.clip_low=1.5", "(0, 1]"]),
    ({"policy.clip_high": 0}, ["policy.clip_high=0.0", "(0, inf)"]),
    ({"reward.bound": 2}, ["reward.bound=2.0", "reward.loss=logistic"]),
    ({"reward.loss": "linear", "reward.bound": 0}, ["reward.bound=0.0"]),
    ({"reward.trunk": "detached", "reward.trunk_scale": 0.5}, ["reward.trunk_scale=0.5"]),
    ({"reward.preference_weight": 2}, ["reward.preference_weight=2.0", "reward.preferences"]),
    ({"reward.preferences": ["a"], "data.eval_preferences": ["a"]}, ["a stands in", "never"]),
    ({"ddp.overlap_grad_reduce": True}, ["ddp.overlap_grad_reduce", "rft"]),
    ({"algorithm.reward_steps": 0}, ["algorithm.reward_steps=0"]),
    ({"algorithm.policy_steps": -1}, ["algorithm.policy_steps=-1"]),
    ({"reward.mix_rounds": -1}, ["reward.mix_rounds=-1"]),
])
def test_rft_combinations_that_cannot_run(changes: dict, words: list[str]):
    with pytest.raises(UserError) as caught:
        check_recipe(recipe_with(changes, "rft"))
    for word in words:
        assert word in str(caught.value)


def test_sft_has_no_reward_to_judge_preferences():
    with pytest.raises(UserError, match="data.eval_preferences conflicts with algorithm.name=sft"):
        check_recipe(recipe_with({"data.eval_preferences": ["p"]}, "sft"))
