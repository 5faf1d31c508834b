"""A run is named by what differs from the defaults, and two recipes are compared key by key."""

import dataclasses
from dataclasses import field, make_dataclass, replace
from pathlib import Path

import pytest

from megatron_irl.config import Recipe, differences, fingerprint, load_recipe, resolve


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text("")
    Path("p.jsonl").write_text("")


def load(name: str, *overrides: str) -> Recipe:
    Path("recipe.yaml").write_text(
        f"model: {{hf: m}}\ndata: {{train: d.jsonl}}\nalgorithm: {{name: {name}}}\noutput_dir: o\n"
    )
    return resolve(load_recipe("recipe.yaml", overrides), 20)


def with_new_key(recipe: Recipe, section: str, value: int = 3) -> Recipe:
    """The recipe as a later version has it, whose section has one more key with default 3."""
    old = getattr(recipe, section)
    later = make_dataclass(
        type(old).__name__, [("brand_new", int, field(default=3))], bases=(type(old),), frozen=True
    )
    values = {f.name: getattr(old, f.name) for f in dataclasses.fields(old)}
    return replace(recipe, **{section: later(**values, brand_new=value)})


@pytest.mark.parametrize("name", ["sft", "irft", "spin", "rft"])
@pytest.mark.parametrize("section", ["train", "generation", "algorithm", "schedule", "data"])
def test_a_key_that_is_new_does_not_rename_a_run(name, section):
    recipe = load(name)
    later = with_new_key(recipe, section)
    assert fingerprint(later) == fingerprint(recipe)
    assert differences(later, later) == []
    changed = with_new_key(recipe, section, 4)
    assert fingerprint(changed) != fingerprint(recipe)
    assert differences(later, changed) == [f"{section}.brand_new=3 there and 4 now"]


def test_differences_are_named():
    known = load("rft", "algorithm.beta=0.3", "reward.mix_rounds=1")
    now = load("rft", "policy.clip_low=0.1", "seed=5", "optimizer.lr=1e-4")
    assert differences(known, now) == [
        "algorithm.beta=[0.3] there and [0.1] now",
        "optimizer.lr=(not set) there and 0.0001 now",
        f"policy.clip_low={known.policy.clip_low} there and 0.1 now",
        "reward.mix_rounds=1 there and 0 now",
        "seed=1234 there and 5 now",
    ]


@pytest.mark.parametrize("override", [
    "output_dir=p", "logging.interval=5", "parallel.timeout_minutes=7", "checkpoint.keep=9",
    "data.train=./d.jsonl", "model.hf=./m", "generation.keep_cache=true",
    "generation.offload_optimizer=true", "generation.pipeline=stages"])
def test_how_it_is_run_is_no_difference(override):
    assert differences(load("irft"), load("irft", override)) == []
