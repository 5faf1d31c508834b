"""``megatron-irl filter``: which demonstrations are kept, and what is refused."""

import gzip
import json

import numpy as np
import pandas
import pytest

from megatron_irl.data.demonstrations import load_demonstrations
from megatron_irl.data.ledger import LedgerRow, read_ledger, write_ledger
from megatron_irl.data.tokenizer import load_tokenizer
from tests.cli.harness import read_jsonl, refused, run, write_jsonl, write_recipe
from tests.convert.tiny import make_tokenizer

LIMITS = {"max_prompt_length": 99, "max_response_length": 10}


@pytest.fixture
def tokenizer(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def train(tmp_path):
    """Records of both forms with fields of their own; the second is too long for the run."""
    return write_jsonl(tmp_path / "train.jsonl", [
        {"prompt": "0+0", "response": "0", "note": {"é": [1]}},
        {"prompt": "long", "response": "x" * 50},
        {"messages": [{"role": "user", "content": "1+1", "name": None},
                      {"role": "assistant", "content": "2"}], "answer": 2},
        {"prompt": "2+2", "response": "4"},
        {"prompt": "3+3", "response": "6"},
    ])


@pytest.fixture
def run_folder(tmp_path, tokenizer, train):
    """A run folder with a ledger of two rounds; rewards 0.5, -1, 2, -1 in the newest."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("")
    add_ledger(folder, [train], tokenizer, 0, [3.0, 2.0, 1.0, 0.0])
    add_ledger(folder, [train], tokenizer, 1, [0.5, -1.0, 2.0, -1.0])
    return folder


def add_ledger(folder, files, tokenizer, round_index, rewards):
    demonstrations, _ = load_demonstrations(files, tokenizer, **LIMITS)
    write_ledger(folder / "ledger", round_index, [
        LedgerRow.of(d, r) for d, r in zip(demonstrations, rewards, strict=True)])


@pytest.mark.parametrize(("options", "lines", "said"), [
    (("--min-reward", 0.5), [0, 3], "kept 2 of 4 demonstrations, those with a reward of at least "
                                    "0.5 in round 1"),
    (("--min-reward", -5), [0, 2, 3, 4], "kept 4 of 4"),
    (("--top-quantile", 0.25), [3], "kept 1 of 4"),
    (("--top-quantile", 0.26), [0, 3], "kept 2 of 4"),  # rounded up
    (("--top-quantile", 0.75), [0, 2, 3, 4], "kept 4 of 4"),  # the third ties with the fourth
    (("--top-quantile", 1.0), [0, 2, 3, 4], "kept 4 of 4"),
    (("--top-quantile", 0.5, "--round", 0), [0, 2], "at least 2 in round 0"),
])
def test_original_records_are_kept_in_order(run_folder, train, tmp_path, options, lines, said):
    out = tmp_path / "kept.jsonl"
    result = run("filter", run_folder, "--out", out, *options)
    assert result.code == 0 and said in result.err
    original = read_jsonl(train)
    assert read_jsonl(out) == [original[i] for i in lines]


def test_a_run_can_train_on_what_was_kept(run_folder, tokenizer, tmp_path):
    assert run("filter", run_folder, "--out", tmp_path / "kept.jsonl", "--min-reward", 0).code == 0
    kept, _ = load_demonstrations(tmp_path / "kept.jsonl", tokenizer, **LIMITS)
    assert [d.response for d in kept] == ["0", "4"]


def test_several_files_of_every_kind(tmp_path, tokenizer, run_folder):
    rng = np.random.default_rng()
    records = [{"prompt": f"{i}", "response": f"{i}"} for i in range(30)]
    write_jsonl(tmp_path / "a.jsonl", records[:10])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(r) + "\n" for r in records[10:20]))
    pandas.DataFrame(records[20:]).to_parquet(tmp_path / "c.parquet")
    rewards = rng.normal(size=30).astype(np.float32).astype(float)
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    add_ledger(run_folder, files, tokenizer, 2, rewards)
    result = run("filter", run_folder, "--out", tmp_path / "kept.jsonl", "--min-reward", 0.1)
    assert result.code == 0
    assert read_jsonl(tmp_path / "kept.jsonl") == [
        record for record, reward in zip(records, rewards, strict=True) if reward >= 0.1]


@pytest.mark.parametrize(("options", "named"), [
    ((), ("--min-reward", "--top-quantile", "neither is given")),
    (("--min-reward", 1, "--top-quantile", 0.5), ("both are given",)),
    (("--min-reward", "nan"), ("--min-reward nan", "finite")),
    (("--top-quantile", 0), ("--top-quantile 0.0", "at most 1")),
    (("--top-quantile", 1.5), ("--top-quantile 1.5",)),
    (("--min-reward", 2.1), ("--min-reward 2.1", "highest reward", "2")),
    (("--min-reward", 0, "--round", 7), ("round 7", "0, 1")),
])
def test_threshold_is_refused(run_folder, tmp_path, options, named):
    refused("filter", run_folder, "--out", tmp_path / "kept.jsonl", *options, named=named)
    assert not (tmp_path / "kept.jsonl").exists()


def refuse(folder, out, *named):
    refused("filter", folder, "--out", out, "--min-reward", 0, named=named)


def test_folder_is_refused(run_folder, tmp_path):
    refuse(tmp_path, tmp_path / "kept.jsonl", "not a run folder", "recipe.yaml")
    for file in (run_folder / "ledger").iterdir():
        file.unlink()
    refuse(run_folder, tmp_path / "kept.jsonl", "no demonstration ledger", "rft")
    assert not (tmp_path / "kept.jsonl").exists()


def test_ledger_of_some_demonstrations_is_refused(run_folder, tmp_path):
    """What was not scored must not pass for a low reward."""
    ledger, out = run_folder / "ledger", tmp_path / "kept.jsonl"
    write_ledger(ledger, 2, read_ledger(ledger, 1)[:2], is_complete=False)
    refuse(run_folder, out, "round 2", "the 2 demonstrations", "Rounds that have all: 0, 1",
           "--round")
    for round_index in (0, 1):
        (ledger / f"round_{round_index:04d}.parquet").unlink()
    refuse(run_folder, out, "round 2", "train", "finish", "reward.ledger=every_round")
    assert not out.exists()


def test_files_changed_since_are_refused(run_folder, train, tmp_path):
    lines = train.read_text().splitlines()
    out = tmp_path / "kept.jsonl"
    train.write_text("\n".join([lines[0], *lines[2:]]))  # a line is gone: the rest moved up
    refuse(run_folder, out, "train.jsonl:3", "3 of 4 differ", "changed")
    train.write_text("\n".join([*lines[:4], lines[4].replace("6", "7")]))
    refuse(run_folder, out, "train.jsonl:5", "1 of 4 differ")
    train.write_text("\n".join([*lines[:4], "{"]))
    refuse(run_folder, out, "train.jsonl:5", "not JSON")
    train.unlink()
    refuse(run_folder, out, "train.jsonl", "working directory")
    assert not out.exists()
    train.write_text("\n".join([*lines, json.dumps({"prompt": "new", "response": "one"})]))
    assert run("filter", run_folder, "--out", out, "--min-reward", 0).code == 0  # a line more


def test_out_is_refused(run_folder, train, tmp_path):
    before = train.read_bytes()
    refuse(run_folder, train, "--out", "exists already", "--overwrite")
    refused("filter", run_folder, "--out", train, "--min-reward", 0, "--overwrite",
            named=("--out", "data.train", "another"))
    refuse(run_folder, tmp_path / "kept.json", ".jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    refuse(run_folder, tmp_path / "folder.jsonl", "folder.jsonl", "give a file")
    assert train.read_bytes() == before
    (out := tmp_path / "kept.jsonl").write_text("work of hours")
    refuse(run_folder, out, "kept.jsonl exists already", "--overwrite")
    assert out.read_text() == "work of hours"
    arguments = ("filter", run_folder, "--out", out, "--min-reward", 0)
    assert run(*arguments, "--overwrite").code == 0 and len(read_jsonl(out)) == 2


def test_turns_that_were_rated_apart_are_records_of_their_own(tmp_path, tokenizer):
    """Under ``data.turns: each`` a turn is kept with what came before it, not with what follows.

    Trained on with ``data.turns: last``, the file gives the ids that were rated.
    """
    turn = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
    again = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}
    extra = {"chat_template_kwargs": {"mood": "fine"}, "answer": "4"}
    write_jsonl(tmp_path / "turns.jsonl", [
        {"messages": [*turn, *again], **extra}, {"messages": [*again]},
        {"prompt": "3+3=", "response": "6"}, {"messages": [*turn, *again, *turn], "id": 3}])
    given = {"max_prompt_length": 99, "max_response_length": 10, "turns": "each"}
    scored, _ = load_demonstrations(tmp_path / "turns.jsonl", tokenizer, **given)
    assert len(scored) == 7
    folder = tmp_path / "run"
    folder.mkdir()
    write_recipe(folder / "recipe.yaml", model={"hf": str(tmp_path)}, algorithm={"name": "rft"},
                 data={"train": str(tmp_path / "turns.jsonl"), "turns": "each"},
                 output_dir=str(folder))
    rewards = [1.0, 0.0, 2.0, 3.0, -1.0, 4.0, 5.0]
    write_ledger(folder / "ledger", 0, [
        LedgerRow.of(d, r) for d, r in zip(scored, rewards, strict=True)])
    out = tmp_path / "kept.jsonl"
    result = run("filter", folder, "--out", out, "--min-reward", 1)
    assert result.code == 0 and "kept 5 of 7" in result.err, result.err
    assert read_jsonl(out) == [
        {"messages": [*turn], "chat_template_kwargs": extra["chat_template_kwargs"]},
        {"messages": [*again]}, {"prompt": "3+3=", "response": "6"},
        {"messages": [*turn, *again]}, {"messages": [*turn, *again, *turn]}]
    kept, _ = load_demonstrations(out, tokenizer, **LIMITS)
    for ours, theirs in zip(kept, [scored[i] for i in (0, 2, 3, 5, 6)], strict=True):
        assert ours.prompt_ids.tolist() == theirs.prompt_ids.tolist()
        assert ours.response_ids.tolist() == theirs.response_ids.tolist()
