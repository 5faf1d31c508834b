"""What one rank cannot read or write ends every rank with code 2, and one of them says why.

Without that the others would wait in their next collective; so on the code before, these jobs do
not end in the pool's time.
"""

import pytest

from tests.cli import jobs
from tests.cli.harness import write_jsonl, write_recipe

BANK = "megatron_irl.data.pair_bank.PairBank.read_part"


def assert_all_refuse(answers):
    assert [code for code, _ in answers] == [2, 2], answers
    said = ["the disk of one rank" in errors for _, errors in answers]
    assert sorted(said) == [False, True], answers


@pytest.mark.parametrize("rank", [0, 1])
def test_held_out_pairs_that_one_rank_cannot_read(pool, sections, tmp_path, rank):
    """The first evaluation reads what it has sampled, before anything is scored."""
    sections["evaluation"] = {"before": True}
    recipe = write_recipe(tmp_path / "r.yaml", **sections)
    assert_all_refuse(pool.run(
        2, jobs.command_with_a_failure, timeout=90.0, arguments=["train", str(recipe)],
        target=BANK, rank=rank, calls=1, only="heldout",
    ))


def test_a_part_of_generate_that_cannot_be_written(pool, model, tmp_path):
    """The first of several, so that the other rank would go on to the second."""
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{a}+{a}"} for a in range(6)])
    given = ["generate", "--model", model, "--prompts", prompts, "--out", tmp_path / "o.jsonl",
             "--max-new-tokens", 4, "--data-parallel-size", 2, "--part-size", 1]
    assert_all_refuse(pool.run(
        2, jobs.command_with_a_failure, timeout=90.0, arguments=[str(word) for word in given],
        target="megatron_irl.storage.partial.PartialJsonl.append", rank=0, calls=1,
    ))


def test_a_step_that_the_main_rank_cannot_log(pool, sections, tmp_path):
    """The second of four; the other rank hears of it in the agreement after the step."""
    assert_all_refuse(pool.run(
        2, jobs.command_with_a_failure, timeout=90.0,
        arguments=["train", str(write_recipe(tmp_path / "r.yaml", **sections))],
        target="megatron_irl.run.runlog.RunLog.log_metrics", rank=0, calls=2,
    ))
