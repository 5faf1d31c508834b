"""A default that was changed: new runs have the new one, and runs of before keep theirs."""

from pathlib import Path

import pytest

from megatron_irl.config import Recipe, fingerprint, load_recipe, resolve, to_yaml
from megatron_irl.config.former import keep_former


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text("")


def load(name: str, *overrides: str) -> Recipe:
    Path("recipe.yaml").write_text(
        f"model: {{hf: m}}\ndata: {{train: d.jsonl}}\nalgorithm: {{name: {name}}}\noutput_dir: o\n")
    return load_recipe("recipe.yaml", overrides)


def recorded(recipe: Recipe) -> Recipe:
    """As the folder of a run has it."""
    Path("recorded.yaml").write_text(to_yaml(resolve(recipe, 20)))
    return load_recipe("recorded.yaml")


@pytest.mark.parametrize(("name", "anchor"), [("irft", 0.3), ("spin", 0.0), ("rft", 0.0)])
def test_only_irft_is_anchored_unless_it_is_said(name, anchor):
    assert resolve(load(name), 20).algorithm.nll_coefficient == anchor
    said = resolve(load(name, "algorithm.nll_coefficient=0"), 20)
    assert said.algorithm.nll_coefficient == 0.0
    assert recorded(load(name)).algorithm.nll_coefficient == anchor


@pytest.mark.parametrize(("name", "plain", "anchored"), [
    ("irft", "6a3ccde889a4c09f", "a03f99b3eebd67d9"),
    ("spin", "5d6e5a6a9a6c8ddb", "3496cd16832a1005"),
    ("rft", "de38542ab23f62c5", "281ca2797007f0c8"),
])
def test_runs_are_named_as_before(name, plain, anchored):
    """Recorded from the version before, which had 0 where a recipe was silent."""
    for value, known in (("0", plain), ("0.1", anchored)):
        recipe = resolve(load(name, f"algorithm.nll_coefficient={value}"), 20)
        assert fingerprint(recipe) == known
    assert (fingerprint(resolve(load(name), 20)) == plain) == (name != "irft")


def test_a_silent_recipe_goes_on_with_what_the_run_began_with():
    silent, before = load("irft"), recorded(load("irft", "algorithm.nll_coefficient=0"))
    kept, notes = keep_former(silent, before)
    assert kept.algorithm.nll_coefficient == 0.0
    assert notes == ["algorithm.nll_coefficient is 0, as this run began; a run that begins now "
                     "has 0.3."]
    # A record that is older than the key; a run of now; another value, which is refused elsewhere.
    assert keep_former(silent, load("irft"))[0] == kept
    for other in ("0.3", "0.1"):
        known = recorded(load("irft", f"algorithm.nll_coefficient={other}"))
        assert keep_former(silent, known) == (silent, [])


@pytest.mark.parametrize("value", ["0", "0.3", "0.1"])
def test_what_the_recipe_says_counts(value):
    said = load("irft", f"algorithm.nll_coefficient={value}")
    assert keep_former(said, recorded(load("irft", "algorithm.nll_coefficient=0"))) == (said, [])


def test_others_have_nothing_to_say():
    for name in ("spin", "rft"):
        kept, notes = keep_former(load(name), recorded(load(name)))
        assert kept.algorithm.nll_coefficient == 0.0 and notes == []
    assert keep_former(load("sft"), recorded(load("sft"))) == (load("sft"), [])
