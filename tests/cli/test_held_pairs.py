"""A rank holds the pairs that it scores and trains on, and reads no others."""

import pytest

from tests.cli import jobs
from tests.cli.harness import read_jsonl, write_recipe


@pytest.mark.parametrize("name", ["irft", "rft"])
def test_four_replicas_hold_a_round_between_them(pool, sections, tmp_path, name):
    """16 samples in parts of 2: a replica scores a quarter, and trains on two a phase."""
    samples = {"irft": 1, "rft": 2}[name]
    sections["algorithm"] = {"name": name, "rounds": 2, "beta": 0.1,
                             "prompts_per_round": 16 // samples}
    if name == "irft":
        sections["algorithm"] |= {"steps_per_round": 2}
    else:
        sections["algorithm"] |= {"reward_steps": 2, "policy_steps": 2}
        sections["policy"] = {"samples_per_prompt": samples}
    sections["data"].pop("eval")
    sections["generation"] |= {"part_size": 2 // samples}
    sections["train"] = {"micro_batch_size": 1, "global_batch_size": 4}
    recipe = write_recipe(tmp_path / "r.yaml", **sections)
    answers = pool.run(4, jobs.pairs_held, arguments=["train", str(recipe)])
    for held, parts in answers:
        # Of 16 samples in 8 parts: two parts to score, and two samples of others to train on.
        assert held <= 2 * 2 + 2 * (1 if name == "irft" else 2), answers
        assert len(parts) <= 2 * (2 + 2 * (1 if name == "irft" else 2)), answers
    assert {part for _, parts in answers for part in parts} == {
        (round, part) for round in (0, 1) for part in range(8)}
    lines = read_jsonl(tmp_path / "run" / "rounds.jsonl")
    assert [line["generation"]["samples"] for line in lines] == [16, 16]
