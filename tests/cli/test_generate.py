"""``generate`` in chunks: the same samples, and a kill costs a chunk at most."""

import json
import os
import shutil

import numpy as np
import pytest

from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.storage.partial import PartialJsonl
from tests.cli import jobs
from tests.cli.harness import read_jsonl, refused, run, write_jsonl
from tests.cli.test_resume import Killed

NUM_PROMPTS = 9


@pytest.fixture
def prompts(tmp_path):
    records = [{"prompt": f"{a}+{a}" * (1 + a % 3), "id": a} for a in range(NUM_PROMPTS)]
    return write_jsonl(tmp_path / "prompts.jsonl", records)


def command(model, prompts, out, *options):
    return ["generate", "--model", model, "--prompts", prompts, "--out", out, "--seed", 11,
            "--max-new-tokens", 6, *options]


def lines(model, prompts, out, *options):
    result = run(*command(model, prompts, out, *options))
    assert result.code == 0, result.err
    return read_jsonl(out)


def assert_same(got, expected):
    assert len(got) == len(expected) == NUM_PROMPTS
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a["logprobs"], b["logprobs"], atol=1e-4)
        assert a | {"logprobs": 0} == b | {"logprobs": 0}


def killed_at(monkeypatch, method, call, *arguments):
    """Run a command that is killed at the given call of a method of ``PartialJsonl``."""
    original, calls = getattr(PartialJsonl, method), []

    def wrapped(self, *args):
        calls.append(method)
        if len(calls) == call:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PartialJsonl, method, wrapped)
        run(*arguments)


def keys_of(monkeypatch):
    """The keys of every prompt generated from now on."""
    keys, original = [], MegatronGenerator.generate

    def watched(self, prompts, *args, **kwargs):
        keys.append(list(kwargs["keys"]))
        return original(self, prompts, *args, **kwargs)

    monkeypatch.setattr(MegatronGenerator, "generate", watched)
    return keys


@pytest.fixture
def killed(model, prompts, tmp_path, monkeypatch):
    """The folder of partial lines of a command killed with two chunks of two written."""
    out = tmp_path / "out.jsonl"
    killed_at(monkeypatch, "append", 3, *command(model, prompts, out, "--part-size", 2))
    assert not out.exists()
    return tmp_path / ".out.jsonl.partial"


def test_chunks_change_no_sample(model, prompts, tmp_path, monkeypatch):
    whole = lines(model, prompts, tmp_path / "whole.jsonl")
    assert len({tuple(line["token_ids"]) for line in whole}) > 5
    keys = keys_of(monkeypatch)
    assert_same(lines(model, prompts, tmp_path / "a.jsonl", "--part-size", 4), whole)
    assert keys == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert_same(lines(model, prompts, tmp_path / "b.jsonl", "--part-size", 1), whole)
    assert len(list(tmp_path.iterdir())) == 4, "something is left beside the files"


@pytest.mark.parametrize("torn", [b"", b'{"prompt": "4+4", "id": 4, "resp'])
def test_killed_command_goes_on_where_it_was(
    model, prompts, killed, tmp_path, monkeypatch, torn
):
    assert len((killed / "lines.jsonl").read_bytes().splitlines()) == 4
    with open(killed / "lines.jsonl", "ab") as file:
        file.write(torn)
    whole = lines(model, prompts, tmp_path / "whole.jsonl")
    keys = keys_of(monkeypatch)
    result = run(*command(model, prompts, tmp_path / "out.jsonl", "--part-size", 3))
    assert result.code == 0 and "resuming: 4 of 9 prompts are done" in result.err, result.err
    assert keys == [[4, 5, 6], [7, 8]]
    assert_same(read_jsonl(tmp_path / "out.jsonl"), whole)
    assert not killed.exists()


def test_killed_before_the_rename(model, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    killed_at(monkeypatch, "finish", 1, *command(model, prompts, out))
    keys = keys_of(monkeypatch)
    assert len(lines(model, prompts, out)) == NUM_PROMPTS
    assert keys == []


def test_lines_of_other_settings_are_kept_and_refused(model, prompts, killed, tmp_path):
    before = (killed / "lines.jsonl").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(model, other)
    fewer = write_jsonl(tmp_path / "fewer.jsonl", read_jsonl(prompts)[:8])
    out = tmp_path / "out.jsonl"
    for given, named in (
        (command(model, prompts, out, "--seed", 12), ("seed=11 there and 12 now", "4 finished")),
        (command(model, prompts, out, "--top-p", 0.5), ("top_p=1.0 there and 0.5 now",)),
        (command(model, fewer, out), ("prompts=",)),
        (command(other, prompts, out), ("model=", str(other))),
        (command(model, prompts, out, "--precision", "bf16"), ("precision='fp32' there",)),
    ):
        refused(*given, named=(*named, str(killed), "remove"))
    assert (killed / "lines.jsonl").read_bytes() == before
    assert not out.exists()


def test_weights_written_again_are_other_weights(model, prompts, tmp_path, monkeypatch):
    folder, out = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(model, folder)
    killed_at(monkeypatch, "append", 2, *command(folder, prompts, out, "--part-size", 2))
    os.utime(folder / "model.safetensors", (1, 1))
    refused(*command(folder, prompts, out), named=("weights='files ",))


def test_other_layout_goes_on_and_every_rank_refuses(pool, model, prompts, killed, tmp_path):
    whole = lines(model, prompts, tmp_path / "whole.jsonl")
    given = command(model, prompts, tmp_path / "out.jsonl", "--data-parallel-size", 2,
                    "--part-size", 1)
    wrong = pool.run(2, jobs.command, arguments=[*map(str, given), "--seed", "12"])
    assert [code for code, _ in wrong] == [2, 2]
    # Every rank refuses, and one of them says why.
    assert ["seed=11 there and 12 now" in errors for _, errors in wrong] == [True, False]
    for code, errors in pool.run(2, jobs.command, arguments=list(map(str, given))):
        assert code == 0, errors
    assert_same(read_jsonl(tmp_path / "out.jsonl"), whole)
    assert not killed.exists()


def test_part_size_must_count_something(model, prompts, tmp_path):
    refused(*command(model, prompts, tmp_path / "o.jsonl", "--part-size", 0),
            named=("--part-size 0", "at least 1"))


def test_settings_are_readable(killed):
    settings = json.loads((killed / "settings.json").read_text())
    assert settings["seed"] == 11 and settings["max_new_tokens"] == 6


def test_a_run_that_trained_in_fp8_is_opened_in_bf16(finished, prompts, tmp_path):
    """Its parameters' type, which any machine has."""
    folder = shutil.copytree(finished, tmp_path / "run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("precision: fp32", "precision: fp8"))
    expected = lines(finished, prompts, tmp_path / "bf16.jsonl", "--precision", "bf16")
    assert_same(lines(folder, prompts, tmp_path / "fp8.jsonl"), expected)
