"""Greedy evaluation in chunks."""

from megatron_irl.evaluation import heldout
from tests.cli.harness import read_jsonl, run, write_recipe


def test_greedy_answers_are_generated_in_chunks(sections, tmp_path, monkeypatch, no_report):
    """No call holds more than a chunk, and the chunk size changes no answer."""
    sections["algorithm"] = {"name": "sft", "rounds": 1, "steps_per_round": 1}
    sections["evaluation"] = {"samples": False}
    sections["logging"]["samples"] = 5
    sizes, original = [], heldout.generate

    def counting(policy, prompts, *options):
        sizes.append(len(prompts))
        return original(policy, prompts, *options)

    monkeypatch.setattr(heldout, "generate", counting)
    found = []
    for part_size in (2, 5):
        sections["generation"]["part_size"] = part_size
        sections["output_dir"] = str(tmp_path / f"by_{part_size}")
        result = run("train", write_recipe(tmp_path / "r.yaml", **sections))
        assert result.code == 0, result.err
        (line,) = read_jsonl(tmp_path / f"by_{part_size}" / "rounds.jsonl")
        found.append((line["evaluation"], line["examples"]))
    assert sizes == [2, 2, 1, 2, 2, 1, 5, 5]  # before and after training
    assert found[0] == found[1]
    assert len({example["after"] for example in found[0][1]}) > 1
    assert found[0][0]["num_answers"] == 5
