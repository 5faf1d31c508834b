"""``train`` keeps the token ids it made: a second start reads none of the data, nor makes them."""

import json

import pytest

from megatron_irl.config import load_recipe
from megatron_irl.data import demonstrations
from megatron_irl.data.token_store import TokenStore
from megatron_irl.data.token_table import MappedRows
from megatron_irl.run.inputs import read_inputs
from tests.cli import jobs
from tests.cli.harness import (
    deterministic,
    refused,
    run,
    snapshot,
    write_jsonl,
    write_recipe,
)
from tests.cli.test_resume import Killed, kill_after, small


def refuse_to_tokenise(monkeypatch):
    def never(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(demonstrations, "encode_turns", never)


def test_a_resume_does_not_tokenise(sections, tmp_path, monkeypatch, no_report):
    recipes = {name: write_recipe(tmp_path / f"{name}.yaml", **small(sections, tmp_path / name))
               for name in ("whole", "broken")}
    assert run("train", recipes["whole"]).code == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.storage.checkpoint.Checkpointer.save", 1, after=True)
        run("train", recipes["broken"])
    (kept,) = (tmp_path / "broken" / "tokens").iterdir()
    before = snapshot(kept)
    with monkeypatch.context() as patch:
        refuse_to_tokenise(patch)
        result = run("train", recipes["broken"])
    assert result.code == 0 and "demonstrations (" in result.err, result.err
    assert snapshot(kept) == before
    assert deterministic(tmp_path / "broken") == deterministic(tmp_path / "whole")


def test_the_folder_has_no_other_tokens_than_its_own(sections, tmp_path, no_report):
    mapping = small(sections, tmp_path / "run")
    recipe = write_recipe(tmp_path / "r.yaml", **mapping)
    assert run("train", recipe).code == 0
    before = snapshot(tmp_path / "run")
    refused("train", recipe, "data.max_prompt_length=63", named=("belongs to another recipe",))
    assert snapshot(tmp_path / "run") == before
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    (kept,) = (tmp_path / "run" / "tokens").iterdir()
    assert json.loads((kept / "corpus.json").read_text())["digest"] == identity["data"]


def test_a_run_killed_before_it_has_its_folder_starts_again(
    sections, tmp_path, monkeypatch, no_report
):
    recipe = write_recipe(tmp_path / "r.yaml", **small(sections, tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.run.folder.RunFolder.begin", 1, after=False)
        run("train", recipe)
    assert (tmp_path / "run" / "tokens").is_dir() and not (tmp_path / "run" / "run.json").exists()
    refuse_to_tokenise(monkeypatch)
    assert run("train", recipe).code == 0


def test_somebodys_folder_of_that_name_is_respected(sections, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", **small(sections, tmp_path / "run"))
    (tmp_path / "run" / "tokens").mkdir(parents=True)
    (tmp_path / "run" / "tokens" / "vocabulary.txt").write_text("mine")
    refused("train", recipe, named=("is not empty and is not a run",))


def test_plan_writes_nothing_and_training_maps(sections, tmp_path, monkeypatch, no_report):
    recipe = write_recipe(tmp_path / "r.yaml", **small(sections, tmp_path / "run"))
    assert run("plan", recipe).code == 0
    assert not (tmp_path / "run").exists()
    seen = []

    def look(self, *_):
        seen.append(self)
        raise Killed

    monkeypatch.setattr("megatron_irl.run.folder.RunFolder.check", look)
    monkeypatch.setattr("megatron_irl.run.inputs.resolve",
                        lambda recipe, count: seen.append(count) or recipe)
    with pytest.raises(Killed):
        read_inputs(load_recipe(recipe))
    (kept,) = (tmp_path / "run" / "tokens").iterdir()
    found = TokenStore(kept.parent).open(kept.name)
    assert isinstance(found.demonstrations, MappedRows) and len(found.demonstrations) == seen[0]


def test_one_of_two_ranks_tokenises_and_tells_for_both(pool, sections, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", **small(sections, tmp_path / "run"))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": 3}])

    def start(*overrides):
        return pool.run(2, jobs.batches_encoded, arguments=[
            "train", str(recipe), "parallel.data_parallel_size=2", *overrides])

    start_bad = start(f"data.train={bad}")
    assert [code for code, *_ in start_bad] == [2, 2]
    assert f"{bad}:1" in start_bad[0][2] and start_bad[1][2] == ""
    first = start()
    assert [code for code, *_ in first] == [0, 0], first
    assert first[0][1] > 0 and first[1][1] == 0
    assert [code for code, *_ in start()] == [0, 0]
