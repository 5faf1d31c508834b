"""Runs over two stages: sampled in turn or as replicas, and changed over on the way, one run."""

import json

import numpy as np
import pytest

from megatron_irl.data.pair_bank import PairBank
from tests.cli import jobs
from tests.cli.harness import read_jsonl, write_jsonl, write_recipe
from tests.cli.test_rft import preference, rft_recipe

PP2 = "parallel.pipeline_model_parallel_size=2"
LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj", "lm_head"]}
CASES = {
    "plain": {},
    "merged": {"adapter": LORA | {"generation": "merged"}, "optimizer": {"lr": 1e-2}},
    "merged_each_round": {
        "adapter": LORA | {"merge_each_round": True}, "optimizer": {"lr": 1e-2},
        "algorithm": {"reset_optimizer": "round"},
    },
    "applied": {"adapter": LORA | {"generation": "applied"}, "optimizer": {"lr": 1e-2}},
    "offloaded": {"generation": {"offload_optimizer": True}},
    "rft": {},
}


def drawn(folder):
    """(ordinal, ids, log-probabilities) of every sample, by round."""
    bank = PairBank(folder / "pairs")
    return [
        sorted((p.ordinal, p.sample_ids.tolist(), p.sample_logprobs) for p in bank.read_round(n))
        for n in (0, 1)
    ]


def assert_same(got, want):
    """Two folders' tokens, their log-probabilities, and losses of all steps."""
    for ours, theirs in zip(drawn(got), drawn(want), strict=True):
        assert [sample[:2] for sample in ours] == [sample[:2] for sample in theirs]
        for (*_, logprobs), (*_, expected) in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    lines, expected = (read_jsonl(folder / "metrics.jsonl") for folder in (got, want))
    assert len(lines) > 3
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["loss"] for line in expected], rel=1e-5)


def taken(folder):
    """How the stages generated, as ``run.json`` has it."""
    return json.loads((folder / "run.json").read_text())["pipeline"]


class Runs:
    """Runs of one recipe on two ranks, into folders of their own."""

    def __init__(self, pool, recipe, root):
        self.pool, self.recipe, self.root = pool, recipe, root

    def arguments(self, name, pipeline):
        return ["train", str(self.recipe), PP2, f"output_dir={self.root / name}",
                f"generation.pipeline={pipeline}"]

    def whole(self, name, pipeline):
        """A run from where its folder is to its end; returns the folder."""
        for code, errors in self.pool.run(
            2, jobs.command, arguments=self.arguments(name, pipeline)
        ):
            assert code == 0, errors
        return self.root / name

    def killed(self, name, pipeline, *, job=jobs.command_killed, **where):
        """A run that ends before its end."""
        self.pool.run(2, job, arguments=self.arguments(name, pipeline), **where)


@pytest.fixture
def runs(pool, sections, model, data, tmp_path):
    def of(case):
        mapping = sections
        if case == "rft":
            pairs = {
                name: str(write_jsonl(tmp_path / f"{name}.jsonl",
                                      [preference(a, b) for a in range(3)]))
                for name, b in (("train", 1), ("eval", 2))
            }
            mapping = rft_recipe(model, data, pairs, tmp_path / "run")
        for section, keys in CASES[case].items():
            mapping[section] = mapping.get(section, {}) | keys
        return Runs(pool, write_recipe(tmp_path / f"{case}.yaml", **mapping), tmp_path)

    return of


@pytest.mark.parametrize("case", [case for case in CASES if case != "applied"])
def test_replicas_draw_what_stages_do(runs, case):
    """And train on it to the same numbers, with what each of them needs beside the layers."""
    both = runs(case)
    stages, replicas = both.whole("stages", "stages"), both.whole("replicas", "replicas")
    assert_same(replicas, stages)
    first, second = ([tokens for _, tokens, _ in samples] for samples in drawn(stages))
    assert first != second, "the second round samples from other weights"
    assert taken(stages) == {"asked": "stages", "taken": "stages", "note": ""}
    record = taken(replicas)
    assert record["asked"] == record["taken"] == "replicas"
    assert record["note"].startswith("generation: each of the 2 stages samples by itself")


def test_adapters_that_are_applied_are_sampled_by_stages(runs):
    """Of its own accord, and to what the same adapters give when they are merged."""
    applied, merged = runs("applied"), runs("merged")
    automatic = applied.whole("applied", "auto")
    assert taken(automatic) == {
        "asked": "auto", "taken": "stages",
        "note": "generation: the stages of the pipeline decode in turn, because adapters are "
                "sampled from without being merged",
    }
    assert_same(automatic, merged.whole("merged", "replicas"))


@pytest.mark.parametrize(("case", "before", "after"), [
    ("plain", "stages", "replicas"), ("merged", "replicas", "stages"),
    ("rft", "replicas", "stages"), ("offloaded", "stages", "replicas"),
])
def test_a_run_changes_over_where_it_was_killed(runs, case, before, after):
    """Once in the middle of a round's samples, whose parts were laid out for the other way."""
    some = runs(case)
    want = some.whole("want", before)
    some.killed("got", before, steps=1)
    some.killed("got", before, job=jobs.command_killed_sampling, round=1, parts=1)
    begun = list((some.root / "got" / "pairs" / "round_0001").glob("part_*"))
    assert 0 < len(begun) < 3 and taken(some.root / "got")["taken"] == before
    got = some.whole("got", after)
    assert_same(got, want)
    assert taken(got)["taken"] == after
