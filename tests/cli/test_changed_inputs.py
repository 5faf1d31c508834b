"""What may change while a run is stopped changes nothing else; what may not is refused."""

import json

import pytest

from megatron_irl.data.pair_bank import PairBank
from tests.cli.harness import deterministic, read_jsonl, refused, run, write_jsonl, write_recipe
from tests.cli.test_resume import Killed, kill_after, pairs_of, small


def stop(monkeypatch, recipe, target, calls=1, *, after=True):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, target, calls, after=after)
        run("train", recipe)


# 16 demonstrations in chunks of 3 are copied in 6 writes; 6 more add references.
@pytest.mark.parametrize("writes", [3, 6, 8])
def test_spin_killed_while_it_takes_over_the_previous_pairs(
    sections, tmp_path, monkeypatch, no_report, writes
):
    algorithm = {"name": "spin", "rounds": 2, "beta": 0.1, "mix_previous": True}
    recipes = {}
    for name in ("whole", "broken"):
        mapping = sections | {"output_dir": str(tmp_path / name), "algorithm": algorithm}
        recipes[name] = write_recipe(tmp_path / f"{name}.yaml", **mapping)
    assert run("train", recipes["whole"]).code == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_previous_write(patch, writes)
        run("train", recipes["broken"])
    result = run("train", recipes["broken"])
    assert result.code == 0, result.err
    assert deterministic(tmp_path / "broken") == deterministic(tmp_path / "whole")
    refs = [
        [(p.ref_demo_logp, p.ref_sample_logp) for p in PairBank(folder).read_round(1)]
        for folder in (tmp_path / "whole" / "previous", tmp_path / "broken" / "previous")
    ]
    assert refs[0] == refs[1]


def kill_at_previous_write(patch, writes):
    original, count = PairBank.write_part, [0]

    def write_part(self, *arguments):
        entry = original(self, *arguments)
        if self.root.name == "previous":
            count[0] += 1
            if count[0] == writes:
                raise Killed
        return entry

    patch.setattr(PairBank, "write_part", write_part)


def test_spin_refuses_to_mix_pairs_that_are_gone(sections, tmp_path, monkeypatch, no_report):
    """Without them it would go on as if it had been asked not to mix; with them it does."""
    algorithm = {"name": "spin", "rounds": 2, "beta": 0.1, "mix_previous": True}
    mapping = sections | {"output_dir": str(tmp_path / "run"), "algorithm": algorithm,
                          "checkpoint": {"interval": 1}}
    recipe = write_recipe(tmp_path / "r.yaml", **mapping)
    earlier, aside = tmp_path / "run" / "pairs" / "round_0000", tmp_path / "aside"

    # The second pass is sampled, and has not begun to take over the pairs of the first.
    stop(monkeypatch, recipe, "megatron_irl.algorithms.pair_steps.previous_pairs", after=False)
    earlier.rename(aside)
    refused("train", recipe, named=("round_0000 is gone or lacks parts", "Restore the folder"))
    aside.rename(earlier)
    # Within the second pass, the copy with references of this round's is what it trains on.
    stop(monkeypatch, recipe, "megatron_irl.run.loop.optimizer_step", 2)
    copy = tmp_path / "run" / "previous" / "round_0001"
    copy.rename(aside)
    refused("train", recipe, named=("previous lacks pairs of round 1", "in the middle of",
                                    "Restore"))
    aside.rename(copy)
    result = run("train", recipe)
    assert result.code == 0, result.err


def test_another_evaluation_limit_after_a_kill_in_the_first_evaluation(
    sections, tmp_path, monkeypatch, no_report
):
    mapping = small(sections, tmp_path / "run")
    mapping["generation"] = mapping["generation"] | {"part_size": 8}
    recipe = write_recipe(tmp_path / "r.yaml", **mapping)
    stop(monkeypatch, recipe, "megatron_irl.evaluation.heldout.Evaluator._sample_numbers",
         after=False)
    result = run("train", recipe, "evaluation.limit=2")
    assert result.code == 0, result.err
    rounds = read_jsonl(tmp_path / "run" / "rounds.jsonl")
    assert rounds[0]["evaluation_before"]["num_samples"] == 2


def test_other_held_out_preferences_get_their_own_references(
    sections, tmp_path, monkeypatch, no_report
):
    def preferences(name, count):
        records = [
            {"prompt": f"{a}+1", "chosen": str(a + 1), "rejected": "x"} for a in range(count)
        ]
        return str(write_jsonl(tmp_path / f"{name}.jsonl", records))

    two, three = preferences("two", 2), preferences("three", 3)
    mapping = small(sections, tmp_path / "run")
    mapping["data"] = mapping["data"] | {"eval_preferences": two}
    recipe = write_recipe(tmp_path / "r.yaml", **mapping)
    stop(monkeypatch, recipe, "megatron_irl.run.run.Run.save", 2)
    result = run("train", recipe, f"data.eval_preferences={three}")
    assert result.code == 0, result.err
    last = read_jsonl(tmp_path / "run" / "rounds.jsonl")[-1]["evaluation"]
    assert last["num_preferences"] == 3
    kept = json.loads((tmp_path / "run" / "preference_references.json").read_text())
    assert len(kept["logps"]) == 6


def test_changed_demonstrations_are_refused(sections, data, tmp_path, monkeypatch, no_report):
    lines = data["train"].read_text().splitlines(keepends=True)
    train = tmp_path / "train.jsonl"
    train.write_text("".join(lines))
    mapping = small(sections, tmp_path / "run", steps_per_round=2, prompts_per_round=8)
    mapping["data"] = mapping["data"] | {"train": str(train)}
    recipe = write_recipe(tmp_path / "r.yaml", **mapping)
    stop(monkeypatch, recipe, "megatron_irl.run.run.Run.save", 1)
    before = pairs_of(tmp_path / "run", 1)
    train.write_text("".join(lines[1:]))
    refused("train", recipe, named=("other records", "data.train", "Restore"))
    assert pairs_of(tmp_path / "run", 1) == before
    train.write_text("".join(lines))
    assert run("train", recipe).code == 0


def test_all_samples_equal_their_demonstrations_is_said(
    sections, tmp_path, monkeypatch, no_report
):
    from megatron_irl.algorithms import pair_steps

    monkeypatch.setattr(pair_steps, "usable", lambda drawn: drawn.chosen([]))
    recipe = write_recipe(tmp_path / "r.yaml", **small(sections, tmp_path / "run"))
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert result.err.count("the steps are skipped") == 2
    for line in read_jsonl(tmp_path / "run" / "rounds.jsonl"):
        assert any("nothing to learn from (8 samples" in text for text in line["guard"])
