"""RFT from a recipe to its products, killed and resumed, and refused where it makes no sense."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_irl.convert.locate import find_checkpoint, find_hf_source
from megatron_irl.convert.stream import megatron_to_hf
from megatron_irl.data.ledger import complete_rounds, read_ledger
from megatron_irl.data.pair_bank import PairBank
from tests.cli.conftest import small_recipe
from tests.cli.harness import deterministic, read_jsonl, refused, run, write_jsonl, write_recipe
from tests.cli.test_resume import Killed, kill_after
from tests.convert.test_round_trip import assert_same_weights

NUM_DEMONSTRATIONS, ROUNDS = 16, 2


def preference(a: int, b: int) -> dict[str, str]:
    return {"prompt": f"{a}+{b}", "chosen": str(a + b), "rejected": "x" * (1 + a % 3)}


@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    return {
        name: str(write_jsonl(folder / f"{name}.jsonl", [preference(a, b) for a in range(3)]))
        for name, b in (("train", 1), ("eval", 2))
    }


def rft_recipe(model, data, preferences, output_dir) -> dict:
    mapping = small_recipe(model, data, output_dir)
    mapping["algorithm"] = {
        "name": "rft", "rounds": ROUNDS, "reward_steps": 3, "policy_steps": 2, "beta": 0.05,
        "nll_coefficient": 0.1,
    }
    mapping["reward"] = {
        "lr": 1e-2, "mix_rounds": 1, "preferences": preferences["train"], "trunk_scale": 0.5,
    }
    mapping["policy"] = {"samples_per_prompt": 2}
    mapping["data"]["eval_preferences"] = preferences["eval"]
    return mapping


@pytest.fixture
def sections(model, data, preferences, tmp_path):
    return rft_recipe(model, data, preferences, tmp_path / "run")


def test_earlier_pairs_are_trained_on_or_missed(sections, tmp_path, monkeypatch, no_report):
    """A resumed run never tells the samples of fewer rounds from demonstrations in silence."""
    recipe, pairs = write_recipe(tmp_path / "r.yaml", **sections), tmp_path / "run" / "pairs"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.algorithms.rft_steps.score_round", 2, after=False)
        run("train", recipe)
    earlier, aside = pairs / "round_0000", tmp_path / "aside"
    earlier.rename(aside)
    refused("train", recipe, named=("round_0000 is gone or lacks parts", "Restore the folder"))
    aside.rename(earlier)
    said = (earlier / "manifest.json").read_bytes()
    (earlier / "manifest.json").unlink()  # as a message of a damaged one advises
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert (earlier / "manifest.json").read_bytes() == said


def test_filter_needs_the_last_round(sections, tmp_path, monkeypatch, no_report):
    """A round before has its own demonstrations only; the run, finished, has all."""
    recipe, run_folder = write_recipe(tmp_path / "r.yaml", **sections), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.algorithms.rft_steps.score_round", 2, after=False)
        run("train", recipe)
    keep = ("filter", run_folder, "--out", tmp_path / "kept.jsonl", "--top-quantile", 0.5)
    refused(*keep, named=("round 0", "the 6 demonstrations", "reward.ledger", "train"))
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert "reward pass 9/9 sequences" in result.err  # a chunk: 3 prompts, 2 samples of each
    assert f"reward pass {NUM_DEMONSTRATIONS - 6}/{NUM_DEMONSTRATIONS - 6} sequences" in result.err
    refused(*keep, "--round", 0, named=("round 0", "Rounds that have all: 1"))
    result = run(*keep)
    assert result.code == 0 and "kept 8 of 16" in result.err


@pytest.fixture(scope="module")
def finished(model, data, preferences, tmp_path_factory):
    """The folder of a finished run; not to be changed."""
    root = tmp_path_factory.mktemp("rft")
    mapping = rft_recipe(model, data, preferences, root / "run")
    result = run("train", write_recipe(root / "recipe.yaml", **mapping))
    assert result.code == 0, result.err
    return root / "run"


def test_rounds_alternate_reward_and_policy_steps(finished):
    lines = read_jsonl(finished / "metrics.jsonl")
    assert [line["phase"] for line in lines] == (["reward"] * 3 + ["policy"] * 2) * ROUNDS
    assert [line["step"] for line in lines] == list(range(1, 11))
    first = lines[0]  # a head of zeros tells nothing from nothing
    assert first["loss/reward"] == pytest.approx(math.log(2))
    # Two streams of weight 1 and an anchor of 0.1.
    assert first["loss"] == pytest.approx(2 * math.log(2) + 0.1 * first["loss/nll"])
    assert first["reward/margin"] == 0 and first["reward/accuracy"] == 0.5
    assert lines[2]["reward/margin"] > 0
    for line in lines:
        expected = {"policy/entropy", "policy/clip_fraction"} if line["phase"] == "policy" else {
            "reward/demo", "reward/sample", "preference/accuracy", "loss/nll", "logp/demo"}
        assert expected <= set(line)


def test_round_lines_describe_rewards_and_tricks(finished):
    rounds = read_jsonl(finished / "rounds.jsonl")
    assert len(rounds) == ROUNDS
    for index, line in enumerate(rounds):
        pairs = PairBank(finished / "pairs").read_round(index)
        rewards = np.array([pair.reward_sample for pair in pairs])
        assert line["rewards"]["sample_mean"] == pytest.approx(rewards.mean())
        assert line["rewards"]["sample_std"] == pytest.approx(rewards.std())
        assert {"kl_to_reference", "entropy", "demo_mean", "accuracy"} <= set(line["rewards"])
        assert {"repetition", "eos_rate", "mean_length"} <= set(line["generation"])
        assert {"preference_accuracy", "reward_accuracy", "nll"} <= set(line["evaluation"])
        assert line["evaluation"]["num_preferences"] == 3
    assert rounds[0]["rewards"]["kl_to_reference"] == pytest.approx(0, abs=1e-4)
    assert rounds[1]["rewards"]["kl_to_reference"] != pytest.approx(0, abs=1e-4)
    page = (finished / "report.html").read_text()
    assert "Policy loss" in page and "Rewards after reward learning" in page


def test_bank_and_ledger_hold_the_rewards_once_learnt(finished):
    bank = PairBank(finished / "pairs")
    for index in range(ROUNDS):
        pairs = bank.read_round(index)
        # Prompt after prompt, each with its two samples and one demonstration.
        assert len(pairs) == 12
        for first, second in zip(pairs[0::2], pairs[1::2], strict=True):
            assert first.ordinal == second.ordinal
            assert first.reward_demo == second.reward_demo
            assert first.ref_demo_logp == second.ref_demo_logp
        assert any(a.sample_ids.tolist() != b.sample_ids.tolist()
                   for a, b in zip(pairs[0::2], pairs[1::2], strict=True))
        rows = read_ledger(finished / "ledger", index)
        drawn = {pair.ordinal for pair in pairs}
        everything = set(range(NUM_DEMONSTRATIONS))
        assert drawn < everything
        is_last = index == ROUNDS - 1
        assert [row.ordinal for row in rows] == sorted(everything if is_last else drawn)
        by_ordinal = {row.ordinal: row for row in rows}
        for first, second in zip(pairs[0::2], pairs[1::2], strict=True):
            row = by_ordinal[first.ordinal]
            assert row.reward == pytest.approx(first.reward_demo)
            assert row.sample_reward == pytest.approx(
                (first.reward_sample + second.reward_sample) / 2
            )
    assert {row.ordinal for row in rows if row.sample_reward is not None} == drawn
    assert complete_rounds(finished / "ledger") == [ROUNDS - 1]


def test_score_gives_the_explicit_reward_of_hf_reward(finished, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(finished / "hf")
    model = AutoModelForSequenceClassification.from_pretrained(
        finished / "hf_reward", dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(finished / "hf_reward")
    records = [
        {"prompt": [{"role": "user", "content": f"{a}+1"}], "responses": [str(a + 1), "xyz", "1"]}
        for a in range(4)
    ]
    out = tmp_path / "out.jsonl"
    pairs = write_jsonl(tmp_path / "p.jsonl", records)
    result = run("score", "--model", finished, "--pairs", pairs, "--out", out)
    assert result.code == 0, result.err
    everything = []
    for record, line in zip(records, read_jsonl(out), strict=True):
        prompt = tokenizer.apply_chat_template(
            record["prompt"], add_generation_prompt=True, tokenize=False
        )
        for text, reward in zip(record["responses"], line["rewards"], strict=True):
            ids = [*tokenizer(prompt + text, add_special_tokens=False)["input_ids"], 1]
            with torch.no_grad():
                score = model(torch.tensor([ids])).logits.item()
            assert reward == pytest.approx(score, abs=1e-4)
            everything.append(reward)
    assert np.std(everything) > 1e-2, "equal rewards would hide a wrong head"
    same = tmp_path / "same.jsonl"  # the folder by itself, wherever it was copied to
    moved = shutil.copytree(finished / "hf_reward", tmp_path / "moved")
    result = run("score", "--model", moved, "--pairs", pairs, "--out", same)
    assert result.code == 0, result.err
    assert read_jsonl(same) == read_jsonl(out)


@pytest.mark.parametrize("reward", [False, True])
def test_tool_converts_its_checkpoint_into_the_same_folders(finished, tmp_path, reward):
    newest = find_checkpoint(finished)
    out = tmp_path / "hf"
    conversion = megatron_to_hf(newest, out, hf_dir=find_hf_source(newest), reward=reward)
    conversion.run(lambda label, nbytes: None)
    expected = finished / ("hf_reward" if reward else "hf")
    assert_same_weights(out, expected)
    for file in ("config.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (expected / file).read_bytes()


CASES = {
    "in reward learning": ("megatron_irl.run.loop.optimizer_step", 2, True),
    "in scoring": ("megatron_irl.policy.policy.Policy.score_rewards", 2, False),
    "before the first policy step": ("megatron_irl.algorithms.rft_ledger.write_ledger", 1, True),
    "in policy steps": ("megatron_irl.run.loop.optimizer_step", 4, True),
    "in the second round": ("megatron_irl.run.loop.optimizer_step", 7, True),
    "while writing the reward": ("megatron_irl.algorithms.rft_steps.export_hf_reward", 1, False),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_equals_uninterrupted(
    name, sections, finished, tmp_path, monkeypatch, no_report
):
    target, calls, after = CASES[name]
    recipe = write_recipe(tmp_path / "r.yaml", **sections | {"checkpoint": {"interval": 1}})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, target, calls, after=after)
        run("train", recipe)
    folder = tmp_path / "run"
    assert not (folder / "hf_reward").exists()
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert deterministic(folder) == deterministic(finished)
    banks = [PairBank(f / "pairs").read_round(r) for f in (folder, finished) for r in range(ROUNDS)]
    rewards = [[(p.reward_demo, p.reward_sample, p.ref_sample_logp) for p in b] for b in banks]
    assert rewards[:ROUNDS] == rewards[ROUNDS:]
    assert read_ledger(folder / "ledger") == read_ledger(finished / "ledger")
    said = [
        [(line["lengths"], line["rewards"]) for line in read_jsonl(f / "rounds.jsonl")]
        for f in (folder, finished)
    ]
    assert said[0] == said[1]
    for weights in ("hf/model.safetensors", "hf_reward/model.safetensors"):
        assert (folder / weights).read_bytes() == (finished / weights).read_bytes()


def test_unfinished_run_scores_from_its_checkpoint(sections, tmp_path, monkeypatch, no_report):
    """The head is in the checkpoint: the round's ledger is what ``score`` says."""
    sections["algorithm"] |= {"policy_steps": 0, "rounds": 2}
    sections["reward"]["ledger"] = "every_round"
    sections["checkpoint"] = sections.get("checkpoint", {}) | {"asynchronous": False}
    recipe = write_recipe(tmp_path / "r.yaml", **sections)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.run.run.Run.save", 1, after=True)
        run("train", recipe)
    records = [{"prompt": d["messages"][:1], "responses": [d["messages"][1]["content"]]}
               for d in read_jsonl(Path(sections["data"]["train"]))]
    out = tmp_path / "o.jsonl"
    result = run("score", "--model", tmp_path / "run", "--pairs",
                 write_jsonl(tmp_path / "p.jsonl", records), "--out", out)
    assert result.code == 0, result.err
    scored = [line["rewards"][0] for line in read_jsonl(out)]
    ledger = [row.reward for row in read_ledger(tmp_path / "run" / "ledger", 0)]
    assert len(ledger) == NUM_DEMONSTRATIONS
    np.testing.assert_allclose(scored, ledger, atol=1e-5)
    assert np.std(scored) > 0
    prompts = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "1+1"}])
    result = run("generate", "--model", tmp_path / "run", "--prompts", prompts, "--out",
                 tmp_path / "g.jsonl", "--max-new-tokens", 2)
    assert result.code == 0, result.err  # a model without the head reads the checkpoint too


def test_implicit_rewards_are_judged_on_preferences_too(
    model, data, preferences, tmp_path, no_report
):
    """What the last round reports is what ``score`` says of the same file."""
    mapping = small_recipe(model, data, tmp_path / "run")
    mapping["data"]["eval_preferences"] = preferences["eval"]
    mapping["algorithm"]["rounds"] = 1
    result = run("train", write_recipe(tmp_path / "r.yaml", **mapping))
    assert result.code == 0, result.err
    records = read_jsonl(Path(preferences["eval"]))
    pairs = [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]]} for r in records]
    result = run("score", "--model", tmp_path / "run", "--pairs",
                 write_jsonl(tmp_path / "p.jsonl", pairs), "--out", tmp_path / "o.jsonl")
    assert result.code == 0, result.err
    margins = [np.subtract(*line["rewards"]) for line in read_jsonl(tmp_path / "o.jsonl")]
    (line,) = read_jsonl(tmp_path / "run" / "rounds.jsonl")
    assert line["evaluation"]["preference_margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert line["evaluation"]["preference_accuracy"] == np.mean(np.array(margins) > 0)
    assert np.abs(margins).max() > 1e-4


def test_detached_reward_steps_leave_the_policy_alone(sections, tmp_path, no_report):
    """With no policy step either, the policy comes out as it went in."""
    sections["algorithm"] |= {"policy_steps": 0, "rounds": 1, "nll_coefficient": 0.0}
    sections["reward"] = {"lr": 1e-2, "trunk": "detached"}
    result = run("train", write_recipe(tmp_path / "r.yaml", **sections))
    assert result.code == 0, result.err
    from safetensors.torch import load_file

    before = load_file(f"{sections['model']['hf']}/model.safetensors")
    after = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert all(after[name].equal(value) for name, value in before.items())
    assert load_file(tmp_path / "run" / "hf_reward" / "model.safetensors")["score.weight"].any()


@pytest.mark.parametrize(("override", "named"), [
    ("algorithm.name=irft", ("algorithm.name=irft", "only rft", "Remove")),
    ("algorithm.name=sft", ("algorithm.name=sft", "Remove")),
    ("algorithm.steps_per_round=4", ("algorithm.steps_per_round", "reward_steps")),
    ("algorithm.loss=hinge", ("algorithm.loss", "reward.loss")),
    ("reward.los=linear", ("reward.los", "reward.loss")),
    ("reward.loss=hinge", ("reward.loss=hinge", "logistic", "linear")),
    ("reward.preferences=nowhere.jsonl", ("reward.preferences=nowhere.jsonl", "no file")),
    ("policy.samples_per_prompt=1", ("policy.samples_per_prompt=1", "2 or more")),
    ("ddp.overlap_grad_reduce=true", ("ddp.overlap_grad_reduce", "Remove")),
])
def test_value_is_refused(sections, tmp_path, override, named):
    refused("train", write_recipe(tmp_path / "r.yaml", **sections), override, named=named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["reward.preferences", "data.eval_preferences"])
def test_preference_file_with_a_missing_side_is_refused(sections, tmp_path, key):
    broken = write_jsonl(tmp_path / "b.jsonl", [preference(1, 1), {"prompt": "1+1", "chosen": "2"}])
    refused("train", write_recipe(tmp_path / "r.yaml", **sections), f"{key}={broken}",
            named=("b.jsonl:2", "rejected"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["reward.preferences", "data.eval_preferences"])
def test_overlong_preferences_are_refused_as_demonstrations_are(sections, tmp_path, key):
    long = write_jsonl(tmp_path / "b.jsonl", [preference(1, 1), preference(1, 1) | {
        "prompt": "1" * 60}])
    refused("train", write_recipe(tmp_path / "r.yaml", **sections), f"{key}={long}",
            "data.overlong=error", named=("b.jsonl:2", "60 tokens", "data.max_prompt_length=48"))
    assert not (tmp_path / "run").exists()


def test_score_options_that_contradict_an_explicit_reward(finished, tmp_path):
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1+1", "responses": ["2"]}])
    common = ("score", "--pairs", pairs, "--out", tmp_path / "o.jsonl", "--model")
    refused(*common, finished, "--beta", 0.5, named=("--beta 0.5", "explicit", "Remove"))
    refused(*common, finished, "--reference", finished / "hf", named=("--reference", "explicit"))
    reward = finished / "hf_reward"
    refused(*common, reward, "--beta", 0.5, named=("--beta 0.5", "reward model. Remove --beta."))
    refused("generate", "--prompts", pairs, "--out", tmp_path / "o.jsonl", "--model", reward,
            named=("reward model", "to score", "run folder"))
    assert not (tmp_path / "o.jsonl").exists()
