"""Paths of data in a recipe: folders, splits, home, sources with a weight; other trainers' keys."""

from pathlib import Path

import datasets
import pytest
import yaml

from megatron_irl.config import DataSource, SplitConfig, fingerprint, load_recipe, resolve
from megatron_irl.config.aliases import ALIASES
from megatron_irl.config.fields import OPEN_SECTIONS, section_keys, top_level
from megatron_irl.config.resolve import to_yaml
from megatron_irl.errors import UserError


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Load a recipe with overrides, in a folder with files d.jsonl and e.jsonl."""
    monkeypatch.chdir(tmp_path)
    for name in ("d.jsonl", "e.jsonl"):
        Path(name).touch()
    Path("recipe.yaml").write_text(
        "model: {hf: m}\ndata: {train: d.jsonl}\nalgorithm: {name: sft}\noutput_dir: o\n")
    return lambda *overrides: load_recipe("recipe.yaml", overrides)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def test_a_folder_of_the_hub_gives_its_training_split(load):
    touch("hub/README.md", "hub/dataset_infos.json", "hub/.cache/train.jsonl",
          "hub/data/train-00001-of-00002.parquet", "hub/data/train-00000-of-00002.parquet",
          "hub/data/test-00000-of-00001.parquet")
    recipe = load("data.train=hub", "data.eval={path: hub, split: test}")
    assert recipe.data.train == ("hub/data/train-00000-of-00002.parquet",
                                 "hub/data/train-00001-of-00002.parquet")
    assert recipe.data.eval == (DataSource(("hub/data/test-00000-of-00001.parquet",)),)


def test_a_data_set_in_the_cache_of_the_hub(load):
    """Files are links into ``blobs``; of two revisions the one fetched last is meant."""
    touch("datasets--o--n/snapshots/old/train.jsonl", "datasets--o--n/blobs/b1")
    new = Path("datasets--o--n/snapshots/new")
    new.mkdir()
    (new / "train.jsonl").symlink_to("../../blobs/b1")
    touch("datasets--o--n/refs/main")
    Path("datasets--o--n/refs/main").write_text("new")
    assert load("data.train=datasets--o--n").data.train == (str(new / "train.jsonl"),)


@pytest.mark.parametrize(("names", "train"), [
    (["a/train.jsonl.gz", "a/test.jsonl.gz", "b/train.jsonl.gz"],
     ["a/train.jsonl.gz", "b/train.jsonl.gz"]),
    (["train/x.json", "train/y.json", "validation/x.json"], ["train/x.json", "train/y.json"]),
    (["x.jsonl", "y.csv", "notes.txt"], ["x.jsonl", "y.csv"]),
    (["train_sft-00000-of-00001.parquet"], ["train_sft-00000-of-00001.parquet"]),
    (["trainer_log.jsonl", "mytest.jsonl"], ["mytest.jsonl", "trainer_log.jsonl"]),
])
def test_which_files_of_a_folder(load, names, train):
    touch(*(f"set/{name}" for name in names))
    assert load("data.train=set").data.train == tuple(f"set/{name}" for name in train)


def test_a_split_that_is_not_clear_is_asked_for(load):
    touch("hub/train_sft-00000-of-00001.parquet", "hub/train_gen-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"data\.train=hub has several splits: train_gen, "
                                        r"train_sft\. Name one, as in data\.train=\{path: hub, "):
        load("data.train=hub")
    (source,) = load("data.train={path: hub, split: train_sft}").data.train
    assert source.path == ("hub/train_sft-00000-of-00001.parquet",)
    with pytest.raises(UserError, match="has no split dev; it has train_gen, train_sft"):
        load("data.train={path: hub, split: dev}")
    touch("both/train.jsonl", "both/test.jsonl")
    with pytest.raises(UserError, match=r"data\.eval=both has several splits: test, train"):
        load("data.eval=both")


def test_saved_data_sets_stand_for_themselves(load):
    one = datasets.Dataset.from_dict({"prompt": ["a"], "response": ["b"]})
    one.save_to_disk("one")
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk("several")
    assert load("data.train=one").data.train == ("one",)
    assert load("data.train=several").data.train == ("several/train",)
    (source,) = load("data.train={path: several, split: test}").data.train
    assert source.path == ("several/test",)
    assert load("data.train=o*").data.train == ("one",)


def test_home_is_spelled_out_everywhere(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load("output_dir=~/runs/x", "model.hf=~/m",
                  "data.train=[~/d.jsonl, {path: ~/e.jsonl}]", "data.tokenizer=~/t",
                  "data.chat_template=~/c.jinja")
    assert recipe.output_dir == f"{tmp_path}/runs/x" and recipe.model.hf == f"{tmp_path}/m"
    assert recipe.data.train == (f"{tmp_path}/d.jsonl", DataSource((f"{tmp_path}/e.jsonl",)))
    assert (recipe.data.tokenizer, recipe.data.chat_template) == (
        f"{tmp_path}/t", f"{tmp_path}/c.jinja")
    rft = load("algorithm.name=rft", "reward.preferences=~/e.jsonl")
    assert rft.sections["reward"].preferences == (f"{tmp_path}/e.jsonl",)


def test_sources_and_splits_survive_the_run_folder(load):
    recipe = load("data.train=[d.jsonl, {path: e.jsonl, weight: 2, limit: 5, fields: {prompt: Q}}]",
                  "data.split.eval=0.25", "data.split.seed=7", "data.fields={messages: turns}")
    assert recipe.data.train[1] == DataSource(("e.jsonl",), 2.0, 5, fields={"prompt": "Q"})
    assert recipe.data.split == SplitConfig(0.25, 7)
    text = to_yaml(recipe)
    assert yaml.safe_load(text)["data"]["train"][1] == {
        "path": ["e.jsonl"], "weight": 2.0, "limit": 5, "fields": {"prompt": "Q"}}
    Path("written.yaml").write_text(text)
    assert load_recipe("written.yaml") == recipe
    plain, same = load(), load("data.format=auto", "data.fields={}")
    assert fingerprint(resolve(plain, 5)) == fingerprint(resolve(same, 5))
    assert fingerprint(resolve(recipe, 5)) != fingerprint(resolve(plain, 5))


@pytest.mark.parametrize(("override", "message"), [
    ("data.train={weight: 2}", "data.train has no path"),
    ("data.train={path: d.jsonl, wieght: 2}", "unknown key data.train.wieght; did you mean "
     "data.train.weight?"),
    ("data.train={path: d.jsonl, weight: x}", "data.train.weight='x' is a string"),
    ("data.train={path: d.jsonl, weight: 0}", "data.train: weight=0.0 is outside (0, inf)"),
    ("data.train={path: d.jsonl, limit: 0}", "limit=0 of d.jsonl is below 1"),
    ("data.eval={path: e.jsonl, weight: 2}", "only data.train has weights"),
    ("data.train=[d.jsonl, {path: ./d.jsonl}]", "data.train names d.jsonl twice"),
    ("data.train=3", "data.train=3 is an integer; data.train takes a string"),
    ("data.split=0.1", "data.split=0.1 is a number; data.split takes a mapping with eval, seed"),
    ("data.split.eval=1.5", "data.split.eval=1.5 is outside (0, 1)"),
    ("data.split.evall=0.5", "unknown key data.split.evall; did you mean data.split.eval?"),
    ("data.split={seed: 3}", "data.split has no eval"),
    ("data.format=alpca", "data.format=alpca is not one of auto, messages"),
    ("data.fields=[a]", "data.fields=['a'] is a list; data.fields takes a mapping"),
    ("data.fields={prompt: 3}", "data.fields.prompt=3 is an integer"),
])
def test_bad_sources_are_named(load, override, message):
    with pytest.raises(UserError) as raised:
        load(override)
    assert message in str(raised.value)


def test_settings_that_conflict(load):
    with pytest.raises(UserError, match=r"data\.split conflicts with data\.eval"):
        load("data.split.eval=0.1", "data.eval=e.jsonl")
    with pytest.raises(UserError, match=r"data\.overlong=error conflicts with data\.bad_records"):
        load("data.overlong=error", "data.bad_records=drop")


@pytest.mark.parametrize(("given", "meant"), [
    ("lr", "optimizer.lr"), ("learning_rate", "optimizer.lr"),
    ("train.learning_rate", "optimizer.lr"), ("batch_size", "train.global_batch_size"),
    ("per_device_train_batch_size", "train.micro_batch_size"),
    ("num_train_epochs", "algorithm.rounds"), ("model_name_or_path", "model.hf"),
    ("generation.max_length", "generation.max_new_tokens"), ("dtype", "precision"),
    ("temprature", "generation.temperature"), ("train.max_grad_norm", "optimizer.clip_grad"),
    ("lora", "adapter.rank"), ("adapter.r", "adapter.rank"), ("lora_alpha", "adapter.alpha"),
])
def test_keys_of_other_trainers(load, given, meant):
    with pytest.raises(UserError) as raised:
        load(f"{given}=1")
    assert str(raised.value) == f"unknown key {given}; did you mean {meant}?"


def test_every_alias_leads_to_a_key():
    """Fields of the optimizer are Megatron's, and are checked where Megatron is."""
    optimizer = {"lr", "adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "clip_grad"}
    for target in ALIASES.values():
        section, dot, key = target.partition(".")
        keys = optimizer if section in OPEN_SECTIONS else section_keys().get(section, ())
        assert key in keys if dot else target in top_level(), target
