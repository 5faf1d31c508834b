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


@pytest.mark.parametrize("name", ["sft", "irft", "spin"])
def test_round_trip_through_yaml(name: str):
    recipe = resolve(load(name, "algorithm.rounds=2", "data.eval=e.jsonl"), 20)
    Path("written.yaml").write_text(to_yaml(recipe, ["megatron_irl 0.1.0", "revision abc"]))
    again = load_recipe("written.yaml")
    assert again == recipe
    assert resolve(again, 20) == recipe
    assert fingerprint(again) == fingerprint(recipe)
    assert Path("written.yaml").read_text().startswith("# megatron_irl 0.1.0\n# revision abc\n")


def test_round_trip_of_an_unresolved_recipe():
    recipe = load("irft")
    Path("written.yaml").write_text(to_yaml(recipe))
    assert load_recipe("written.yaml") == recipe


def test_sft_yaml_has_no_keys_about_samples():
    assert set(yaml.safe_load(to_yaml(load("sft")))["algorithm"]) == {
        "name", "rounds", "steps_per_round", "reset_optimizer"}


@pytest.mark.parametrize("override", [
    "output_dir=p", "logging.interval=5", "checkpoint.keep=3", "evaluation.greedy=false",
    "data.eval=e.jsonl", "parallel.tensor_model_parallel_size=2", "train.micro_batch_size=2",
    "ddp.overlap_grad_reduce=true", "generation.kv_cache_gb=8", "data.train=./d.jsonl"])
def test_fingerprint_ignores_how_the_run_is_run(override: str):
    assert fingerprint(load("irft", override)) == fingerprint(load("irft"))


@pytest.mark.parametrize("override", [
    "seed=1", "precision=fp32", "algorithm.beta=0.2", "algorithm.rounds=2", "optimizer.lr=1e-4",
    "model.hf=n", "model.num_layers=2", "data.train=e.jsonl", "data.max_response_length=9",
    "train.global_batch_size=16", "generation.temperature=0.5", "generation.chunk_size=8",
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
