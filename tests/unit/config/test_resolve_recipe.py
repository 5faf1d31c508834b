"""Derived values, YAML round trip, fingerprint."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import megatron_irl
from megatron_irl.config import Recipe, fingerprint, load_recipe, resolve, to_yaml
from megatron_irl.errors import UserError

ROOT = str(Path(megatron_irl.__file__).parents[1])


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.jsonl").touch()
    (tmp_path / "e.jsonl").touch()
    monkeypatch.chdir(tmp_path)


def load(name: str, *overrides: str) -> Recipe:
    Path("recipe.yaml").write_text(
        f"model: {{hf: m, recompute_granularity: full}}\ndata: {{train: d.jsonl}}\n"
        f"algorithm: {{name: {name}}}\noptimizer: {{lr: 1e-5}}\noutput_dir: o\n")
    return load_recipe("recipe.yaml", overrides)


@pytest.mark.parametrize(("name", "overrides", "steps", "prompts"), [
    # 20 demonstrations in batches of 8: three steps make a pass.
    ("irft", [], 3, 20),
    ("irft", ["algorithm.steps_per_round=2"], 2, 16),
    ("irft", ["algorithm.prompts_per_round=9"], 2, 9),
    ("irft", ["algorithm.steps_per_round=2", "algorithm.prompts_per_round=4"], 2, 4),
    ("irft", ["algorithm.steps_per_round=5"], 5, 40),
    ("spin", ["algorithm.rounds=2"], 3, 20),
    ("sft", [], 3, None),
    ("sft", ["algorithm.steps_per_round=7"], 7, None),
    # Eight steps of 8 pairs, or of 8 samples: 64 samples, four a prompt.
    ("rft", [], 16, 16),
    ("rft", ["algorithm.reward_steps=2", "algorithm.policy_steps=3"], 5, 6),
    ("rft", ["algorithm.policy_steps=0", "policy.samples_per_prompt=3"], 8, 22),
    ("rft", ["algorithm.prompts_per_round=9"], 16, 9),
])
def test_round_sizes(name: str, overrides: list[str], steps: int, prompts: int | None):
    algorithm = resolve(load(name, *overrides), 20).algorithm
    assert (algorithm.steps_per_round, algorithm.prompts_per_round) == (steps, prompts)
    assert algorithm.name == name


def test_beta_and_generation_budget():
    recipe = resolve(load("irft", "algorithm.rounds=3", "data.max_response_length=99"), 20)
    assert recipe.algorithm.beta == (0.1, 0.1, 0.1)
    assert recipe.generation.max_new_tokens == 99
    given = load("irft", "algorithm.rounds=2", "algorithm.beta=[1, 2]",
                 "generation.max_new_tokens=5")
    assert resolve(given, 20).algorithm.beta == (1.0, 2.0)
    assert resolve(given, 20).generation.max_new_tokens == 5


@pytest.mark.parametrize(("key", "value", "derived"), [("steps_per_round", 4, 3),
                                                       ("prompts_per_round", 8, 20)])
def test_spin_decides_its_own_round_size(key: str, value: int, derived: int):
    with pytest.raises(UserError, match=f"{key}={value} conflicts.*spin.*here {derived}"):
        resolve(load("spin", f"algorithm.{key}={value}"), 20)


def test_no_demonstrations():
    with pytest.raises(UserError, match=r"data.train=d.jsonl has no usable demonstration"):
        resolve(load("irft"), 0)


def test_reference_and_bound_by_algorithm():
    assert resolve(load("irft"), 20).algorithm.reference == "round_start"
    assert resolve(load("rft"), 20).algorithm.reference == "initial"
    assert resolve(load("rft", "algorithm.reference=round_start"), 20).algorithm.reference == (
        "round_start")
    assert resolve(load("rft"), 20).reward.bound is None
    assert resolve(load("rft", "reward.loss=linear"), 20).reward.bound == 5.0
    assert resolve(load("rft", "reward.loss=linear", "reward.bound=2"), 20).reward.bound == 2.0


def test_preference_patterns_that_meet_in_one_file():
    with pytest.raises(UserError, match="d.jsonl stands in reward.preferences and in data.eval_p"):
        load("rft", "reward.preferences=d*.jsonl", "data.eval_preferences=d.jsonl")


@pytest.mark.parametrize("name", ["sft", "irft", "spin", "rft"])
def test_round_trip_through_yaml(name: str):
    recipe = resolve(load(name, "algorithm.rounds=2", "data.eval=e.jsonl"), 20)
    Path("written.yaml").write_text(to_yaml(recipe))
    again = load_recipe("written.yaml")
    if name == "rft":  # its steps are written as reward_steps and policy_steps
        assert "steps_per_round" not in yaml.safe_load(to_yaml(recipe))["algorithm"]
    else:
        assert again == recipe
    assert resolve(again, 20) == recipe
    assert fingerprint(resolve(again, 20)) == fingerprint(recipe)


def test_round_trip_of_an_unresolved_recipe():
    recipe = load("irft")
    Path("written.yaml").write_text(to_yaml(recipe))
    assert load_recipe("written.yaml") == recipe


def test_sft_yaml_has_no_keys_about_samples():
    assert set(yaml.safe_load(to_yaml(load("sft")))["algorithm"]) == {
        "name", "rounds", "steps_per_round", "reset_optimizer", "token_weight",
        "label_smoothing"}


@pytest.mark.parametrize("override", [
    "output_dir=p", "logging.interval=5", "checkpoint.keep=3", "evaluation.greedy=false",
    "data.eval=e.jsonl", "parallel.tensor_model_parallel_size=2", "train.micro_batch_size=2",
    "ddp.overlap_grad_reduce=true", "generation.kv_cache_gb=8", "data.train=./d.jsonl"])
def test_fingerprint_ignores_how_the_run_is_run(override: str):
    assert fingerprint(load("irft", override)) == fingerprint(load("irft"))


@pytest.mark.parametrize("override", [
    "reward.lr=1e-3", "policy.clip_low=0.1", "algorithm.reward_steps=3", "reward.mix_rounds=1"])
def test_fingerprint_tells_rewards_apart(override: str):
    assert fingerprint(load("rft", override)) != fingerprint(load("rft"))
    assert fingerprint(load("rft", "data.eval_preferences=e.jsonl")) == fingerprint(load("rft"))


@pytest.mark.parametrize("override", [
    "seed=1", "precision=fp32", "algorithm.beta=0.2", "algorithm.rounds=2", "optimizer.lr=1e-4",
    "model.hf=n", "model.num_layers=2", "data.train=e.jsonl", "data.max_response_length=9",
    "train.global_batch_size=16", "generation.temperature=0.5", "generation.part_size=8",
    "schedule.min_lr_ratio=0.1"])
def test_fingerprint_tells_experiments_apart(override: str):
    assert fingerprint(load("irft", override)) != fingerprint(load("irft"))


def test_fingerprint_does_not_depend_on_the_process():
    """Python's own hash() does: it is salted by PYTHONHASHSEED."""
    mine = fingerprint(load("irft"))
    program = ("from megatron_irl.config import fingerprint, load_recipe;"
               "import sys; sys.stdout.write(fingerprint(load_recipe('recipe.yaml')))")
    theirs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                             check=True, env={"PYTHONHASHSEED": salt, "PYTHONPATH": ROOT}).stdout
              for salt in ("1", "2")]
    assert theirs == [mine, mine] and len(mine) == 16
