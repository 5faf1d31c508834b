"""Combinations that cannot run, one at a time from a recipe that can."""

import pytest

from megatron_irl.config import Recipe, check_recipe, recipe_from_mapping
from megatron_irl.config.checks import check_given_keys
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


@pytest.mark.parametrize("name", ["sft", "irft", "spin"])
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


def test_sft_refuses_them_even_at_their_default():
    with pytest.raises(UserError, match="algorithm.beta conflicts with algorithm.name=sft"):
        check_given_keys("sft", {"algorithm": {"name": "sft", "beta": 0.1}})
    check_given_keys("irft", {"algorithm": {"name": "irft", "beta": 0.1}})
