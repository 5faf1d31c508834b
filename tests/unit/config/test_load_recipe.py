"""YAML and overrides to a recipe; what a user can get wrong and what they are told."""

from pathlib import Path

import pytest

from megatron_irl.config import check_field_names, load_recipe
from megatron_irl.errors import UserError

RECIPE = """
model: {hf: models/tiny, recompute_granularity: full}
data: {train: "data/*.jsonl"}
algorithm: {name: irft, rounds: 3}
optimizer: {lr: 5e-7, weight_decay: 0.0}
output_dir: runs/tiny
"""


@pytest.fixture
def recipe_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.parquet"):
        (tmp_path / "data" / name).touch()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return Path("recipe.yaml")


def test_values_land_in_their_fields(recipe_path: Path):
    recipe = load_recipe(recipe_path, [])
    assert recipe.model.hf == "models/tiny"
    assert recipe.model.overrides == {"recompute_granularity": "full"}
    assert recipe.data.train == ("data/a.jsonl", "data/b.jsonl")
    assert recipe.algorithm.rounds == 3 and recipe.algorithm.beta == (0.1,)
    assert recipe.optimizer == {"lr": 5e-7, "weight_decay": 0.0}
    assert recipe.train.global_batch_size == 8


def test_overrides_win_and_the_last_one_most(recipe_path: Path):
    recipe = load_recipe(recipe_path, [
        "algorithm.beta=[1, 2.5, 5e-1]", "seed=7", "precision=fp32", "optimizer.lr=1e-5",
        "model.num_layers=4", "train.global_batch_size=16", "train.global_batch_size=24",
        "generation.max_new_tokens=null", "data.train=[data/c.parquet, data/a.jsonl]"])
    assert recipe.algorithm.beta == (1.0, 2.5, 0.5)
    assert (recipe.seed, recipe.precision) == (7, "fp32")
    assert recipe.optimizer["lr"] == 1e-5
    assert recipe.model.overrides["num_layers"] == 4
    assert recipe.train.global_batch_size == 24
    assert recipe.data.train == ("data/c.parquet", "data/a.jsonl")


def test_numeric_strings_are_floats_where_a_float_is_due(recipe_path: Path):
    recipe = load_recipe(recipe_path, ["algorithm.beta='1e-1'", "generation.top_p='0.5'"])
    assert recipe.algorithm.beta == (0.1,) and recipe.generation.top_p == 0.5


def test_empty_sections_and_files_kept_as_patterns(recipe_path: Path):
    recipe_path.write_text(RECIPE + "logging:\nddp:\n")
    recipe = load_recipe(recipe_path, ["data.train=elsewhere/*.jsonl"], check_files=False)
    assert recipe.data.train == ("elsewhere/*.jsonl",)
    assert recipe.ddp == {} and recipe.logging.interval == 1


def test_a_name_with_glob_characters_is_taken_literally(recipe_path: Path):
    Path("data/[x].jsonl").touch()
    assert load_recipe(recipe_path, ["data.train='data/[x].jsonl'"]).data.train == (
        "data/[x].jsonl",)


@pytest.mark.parametrize(("override", "message"), [
    ("train.micro_batchsize=2",
     "unknown key train.micro_batchsize; did you mean train.micro_batch_size?"),
    ("train.beta=1", "unknown key train.beta; did you mean algorithm.beta?"),
    ("beta=1", "unknown key beta; did you mean algorithm.beta?"),
    ("trian.x=1", "unknown key trian; did you mean train?"),
    ("data.zzz=1", "known keys are data.bad_records, data.chat_template, data.chat"),
    ("model.overrides={a: 1}", None),
    ("optimizer=3", "names a section"),
    ("seed.x=1", "seed is a single value"),
    ("seed", "has no value"),
    ("=3", "has no value"),
    ("seed=[", "is not YAML"),
    ("algorithm.name=ppo", "algorithm.name=ppo is not one of sft, irft, spin"),
    ("algorithm.loss=log", "algorithm.loss=log is not one of sigmoid, hinge, linear"),
    ("algorithm.reference=start", "is not one of round_start, initial"),
    ("precision=fp16", "precision=fp16 is not one of fp32, bf16, fp8"),
    ("algorithm.rounds=two", "algorithm.rounds='two' is a string; algorithm.rounds takes an integ"),
    ("algorithm.rounds=2.0", "algorithm.rounds=2.0 is a number"),
    ("algorithm.rounds=true", "algorithm.rounds=True is a boolean"),
    ("algorithm.rounds=null", "algorithm.rounds=None is empty"),
    ("algorithm.beta=[0.1, x, 1]", "algorithm.beta='x' is a string; algorithm.beta takes a number"),
    ("algorithm.beta=.nan", "not finite"),
    ("output_dir=2024", "output_dir=2024 is an integer; output_dir takes a string. Put it in"),
    ("parallel.sequence_parallel=1", "takes true or false"),
    ("generation.cuda_graphs=never", "generation.cuda_graphs=never is not one of auto, off"),
    ("generation.cuda_graphs=true", "generation.cuda_graphs=True is not one of auto, off"),
    ("generation.cuda_graphs=2.5", "is not one of auto, off"),
    ("generation.keep_cache=maybe", "is not one of auto, true, false"),
    ("generation.pipeline=both", "is not one of auto, stages, replicas"),
    ("data.train=data/z*.jsonl", "data.train=data/z*.jsonl matches no file"),
    ("data.eval=models", "data.eval=models is a folder without data files"),
    ("data.train=[data/a.jsonl, data/*.jsonl]", "data.train names data/a.jsonl twice"),
    ("model.hf=", "model.hf: missing"),
])
def test_bad_overrides(recipe_path: Path, override: str, message: str | None):
    if message is None:  # an unknown model key is kept; the model room knows its fields
        recipe = load_recipe(recipe_path, [override])
        assert recipe.model.overrides["overrides"] == {"a": 1}
        return
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_path, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    ("a: [1", "is not YAML at line"),
    ("- 1\n- 2\n", "is not a mapping"),
    ("", "is not a mapping"),
    ("train: {micro_batch_size: 1, micro_batch_size: 2}", "the key micro_batch_size stands twice"),
    ("train: 3", "train=3 is an integer; train is a section"),
    ("train: {global_batch_size: 8}",
     "model.hf, data.train, algorithm.name, output_dir: missing"),
])
def test_bad_files(recipe_path: Path, text: str, message: str):
    recipe_path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_path)
    assert message in str(caught.value)


def test_a_missing_file_is_named_with_the_working_directory(recipe_path: Path):
    with pytest.raises(UserError, match=f"recipe no.yaml does not exist.*{Path.cwd()}"):
        load_recipe("no.yaml")


def test_an_override_can_open_a_section(recipe_path: Path):
    assert load_recipe(recipe_path, ["logging.wandb=true"]).logging.wandb is True


def test_check_field_names():
    allowed = [f"field_{i}" for i in range(30)] + ["weight_decay"]
    check_field_names("optimizer", ["weight_decay"], allowed)
    with pytest.raises(UserError, match="key optimizer.wieght_decay; did you mean optimizer.weig"):
        check_field_names("optimizer", ["wieght_decay"], allowed)
    with pytest.raises(UserError, match="nothing near it among the 31 known keys"):
        check_field_names("optimizer", ["zzz"], allowed)


@pytest.mark.parametrize(("written", "graphs"), [("auto", "auto"), ("off", "off"), ("12", 12)])
def test_words_that_yaml_takes_for_booleans(recipe_path: Path, written: str, graphs: str | int):
    recipe = load_recipe(
        recipe_path, [f"generation.cuda_graphs={written}", "generation.keep_cache=false"]
    )
    assert recipe.generation.cuda_graphs == graphs and recipe.generation.keep_cache == "false"
