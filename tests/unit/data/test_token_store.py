"""A corpus on disk is the corpus that was read, named by all it depends on, whole or not there."""

import json
import os
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_irl.config import DataSource, load_recipe
from megatron_irl.data import corpus
from megatron_irl.data.corpus import read_corpus
from megatron_irl.data.token_key import token_key
from megatron_irl.data.token_store import TokenStore, is_token_store
from megatron_irl.data.token_table import MappedRows
from megatron_irl.data.tokenizer import load_tokenizer
from megatron_irl.errors import UserError

KEY = "0123456789abcdef" * 2


def same(ours, theirs):
    """Assert that two rows are equal field by field, dtypes of arrays included."""
    for field in fields(theirs):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype and one.tolist() == other.tolist(), field.name
        else:
            assert one == other, field.name


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def recipe(tmp_path, byte_folder):
    """Records with several turns, answers, plain prompts and an unpaired surrogate."""
    records = [
        {"messages": [turn("user", "2+2?"), turn("assistant", "4")], "answer": "4"},
        {"messages": [turn("user", "hé"), turn("assistant", "a"), turn("user", "b"),
                      turn("assistant", "ccc")]},
        {"prompt": [turn("user", "q")], "response": "r", "answer": "7\ud800"},
        {"messages": [turn("user", "x" * 300), turn("assistant", "over-long")]},
    ]
    pairs = [{"prompt": [turn("user", "p")], "chosen": "good", "rejected": "bad"}]
    for name, lines in (("train", records * 5), ("eval", records[:2]), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (tmp_path / "recipe.yaml").write_text(json.dumps({
        "model": {"hf": str(byte_folder())}, "algorithm": {"name": "sft", "steps_per_round": 1},
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"),
                 "turns": "all", "max_prompt_length": 100},
    }))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    pairs = (str(tmp_path / "pairs.jsonl"),)  # which sft would refuse, and irft turns: all
    return replace(recipe, data=replace(recipe.data, eval_preferences=pairs))


@pytest.fixture
def tokenizer(recipe):
    return load_tokenizer(recipe.model.hf)


@pytest.fixture
def store(tmp_path):
    return TokenStore(tmp_path / "run" / "tokens")


def build(store, recipe, tokenizer, key=KEY):
    pairs = ("reward.preferences", recipe.data.eval_preferences)
    return store.build(
        key, lambda gather: read_corpus(recipe, tokenizer, preferences=pairs, gather=gather))


@pytest.mark.parametrize("batch_rows", [1, 4, 8192])
def test_what_is_kept_is_what_is_read(recipe, tokenizer, store, monkeypatch, batch_rows):
    monkeypatch.setattr("megatron_irl.data.token_table.BATCH_ROWS", batch_rows)
    direct = read_corpus(
        recipe, tokenizer, preferences=("reward.preferences", recipe.data.eval_preferences))
    assert any(d.loss_mask is not None for d in direct.demonstrations)
    build(store, recipe, tokenizer)
    kept = store.open(KEY)
    for name in ("demonstrations", "heldout", "preferences", "heldout_preferences"):
        rows, theirs = getattr(kept, name), getattr(direct, name)
        assert isinstance(rows, MappedRows) and len(rows) == len(theirs) > 0
        for one, two, other in zip(rows, map(rows.__getitem__, range(len(rows))), theirs,
                                   strict=True):
            same(one, other)
            same(two, other)
    assert (kept.digest, kept.notes) == (direct.digest, direct.notes)
    for name in ("kept", "dropped_prompt", "prompt_tokens", "response_tokens", "remarks"):
        assert getattr(kept.report, name) == getattr(direct.report, name)


def test_slices_and_choices_are_those_of_a_list(recipe, tokenizer, store, monkeypatch):
    monkeypatch.setattr("megatron_irl.data.token_table.BATCH_ROWS", 4)
    rows = build(store, recipe, tokenizer).demonstrations
    whole = [d.ordinal for d in rows]
    assert whole == list(range(15))
    for part in (slice(3), slice(2, 11), slice(None, None, -2), slice(40, 50)):
        assert [d.ordinal for d in rows[part]] == whole[part]
    assert [d.ordinal for d in rows.chosen([9, 0, 9])[1:]] == [0, 9]
    assert rows[-1].ordinal == 14 and not rows[:0]
    with pytest.raises(IndexError):
        rows[15]


def test_ids_are_views_of_the_file(recipe, tokenizer, store):
    """Not copies: that is what ranks share."""
    ids = build(store, recipe, tokenizer).demonstrations[0].prompt_ids
    assert not ids.flags.owndata and not ids.flags.writeable


def test_without_anything_held_out(recipe, tokenizer, store):
    recipe = replace(recipe, data=replace(recipe.data, eval=(), eval_preferences=()))
    kept = store.build(KEY, lambda gather: read_corpus(recipe, tokenizer, gather=gather))
    assert not kept.heldout and not kept.preferences and len(kept.demonstrations) == 15


CHANGES = {
    "limit": {"max_prompt_length": 99}, "overlong": {"overlong": "truncate_prompt"},
    "turns": {"turns": "last"}, "drop": {"bad_records": "drop"}, "fields": {"fields": {"a": "b"}},
    "eval": {"eval": ()}, "format": {"format": "messages"}, "eval_limit": {"eval_limit": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_way_to_read_is_another_key(recipe, tokenizer, change):
    other = replace(recipe, data=replace(recipe.data, **CHANGES[change]))
    assert token_key(other, tokenizer) != token_key(recipe, tokenizer)


def test_key_names_contents_and_not_times(recipe, tokenizer, tmp_path):
    file = tmp_path / "train.jsonl"
    before, stat, text = token_key(recipe, tokenizer), file.stat(), file.read_text()
    os.utime(file, (1, 1))
    assert token_key(recipe, tokenizer) == before
    file.write_text(text.replace("2+2?", "2+3?"))  # as long, and as old
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert token_key(recipe, tokenizer) != before
    file.write_text(text)
    assert token_key(recipe, tokenizer) == before


def test_a_file_that_cannot_be_read_is_for_its_reader_to_tell(recipe, tokenizer, monkeypatch):
    before, opens = token_key(recipe, tokenizer), Path.open

    def refuses(self, *arguments, **named):
        if self.suffix == ".jsonl":
            raise PermissionError(13, "Permission denied", str(self))
        return opens(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuses)
    assert token_key(recipe, tokenizer) != before


def test_key_names_tokenizer_template_and_preferences(recipe, tokenizer, tmp_path):
    keys = [token_key(recipe, tokenizer)]
    pairs = recipe.data.eval_preferences
    keys += [token_key(recipe, tokenizer, pairs),
             token_key(recipe, tokenizer, [DataSource((str(pairs[0]),), weight=2.0)])]
    template = replace(tokenizer.template, text=tokenizer.template.text + " ")
    keys.append(token_key(recipe, replace(tokenizer, template=template)))
    arguments = replace(tokenizer.template, arguments={"a": 1})
    keys.append(token_key(recipe, replace(tokenizer, template=arguments)))
    keys.append(token_key(recipe, replace(tokenizer, embedding_rows=9)))  # refuses other texts
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    keys.append(token_key(recipe, tokenizer))
    assert len(set(keys)) == len(keys)


def test_a_writer_that_was_killed_leaves_nothing_that_is_used(recipe, tokenizer, store):
    build(store, recipe, tokenizer)
    old, new = (store.folder / f".{KEY}.{digit * 32}.partial" for digit in "ab")
    for each in (old, new):
        each.mkdir()
        (each / "train.arrow").write_bytes(b"ARROW1")
    for each in (old / "train.arrow", old):
        os.utime(each, (time.time() - 7200,) * 2)
    other = KEY[::-1]
    assert store.open(other) is None
    build(store, recipe, tokenizer, other)
    assert store.open(other) is not None
    assert not old.exists() and new.exists(), "another machine may still be writing"
    assert is_token_store(store.folder)


@pytest.mark.parametrize("name", ["corpus.json", "train.arrow", "eval_preferences.arrow"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_damaged_one_is_made_again(recipe, tokenizer, store, name, damage):
    digest = build(store, recipe, tokenizer).digest
    file = store.folder / KEY / name
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    assert store.open(KEY) is None
    assert build(store, recipe, tokenizer).digest == digest
    assert store.open(KEY) is not None


def test_the_first_of_two_writers_wins(recipe, tokenizer, store):
    def read(gather):
        found = read_corpus(recipe, tokenizer, gather=gather)
        build(store, recipe, tokenizer)  # the other one, which finishes meanwhile
        (store.folder / KEY / "theirs").touch()
        return found

    assert len(store.build(KEY, read).demonstrations) == 15
    assert (store.folder / KEY / "theirs").exists()
    assert [p.name for p in store.folder.iterdir()] == [KEY]


def test_bad_data_leaves_no_folder(recipe, tokenizer, store, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"messages": 3}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:1"):
        build(store, recipe, tokenizer)
    assert not (tmp_path / "run").exists()


def test_full_disk_is_one_message(recipe, tokenizer, store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_irl.data.token_table.TableWriter._flush", full)
    with pytest.raises(UserError, match="No space left on device"):
        build(store, recipe, tokenizer)
    assert not store.folder.exists()


def test_discarding_and_keeping_only_one(recipe, tokenizer, store, tmp_path):
    build(store, recipe, tokenizer)
    build(store, recipe, tokenizer, KEY[::-1])
    store.keep_only(KEY)
    assert store.open(KEY) is not None and store.open(KEY[::-1]) is None
    fresh = TokenStore(tmp_path / "other" / "run" / "tokens")
    build(fresh, recipe, tokenizer)
    fresh.discard(KEY)
    assert not (tmp_path / "other").exists()


def test_only_ours_is_a_token_store(tmp_path):
    assert is_token_store(tmp_path)
    (tmp_path / "vocabulary.txt").touch()
    assert not is_token_store(tmp_path)


def test_lists_where_nothing_is_kept(recipe, tokenizer):
    found = corpus.read_corpus(recipe, tokenizer)
    assert isinstance(found.demonstrations, list) and isinstance(found.heldout, list)
