"""Runs with adapters, as users meet them: products, references, rounds, resume, wrong input."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_irl.data.pair_bank import PairBank
from megatron_irl.policy.policy import Policy
from tests.cli.harness import deterministic, read_jsonl, refused, run, write_jsonl, write_recipe
from tests.cli.test_resume import Killed, kill_after
from tests.convert.tiny import make_tiny_llama

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
MERGES = {"adapter.merge_each_round": "true", "algorithm.reset_optimizer": "round"}


@pytest.fixture
def recipe(sections, tmp_path):
    """A recipe file with adapters on every layer; rounds share all prompts."""
    sections["adapter"] = {"rank": 4, "alpha": 8, "targets": LAYERS}
    sections["optimizer"]["lr"] = 1e-2
    sections["algorithm"]["prompts_per_round"] = 16
    sections["evaluation"] = {"interval": "never"}
    return write_recipe(tmp_path / "recipe.yaml", **sections)


def train(recipe, out, **changes):
    result = run("train", recipe, f"output_dir={out}", *[f"{k}={v}" for k, v in changes.items()])
    assert result.code == 0, result.err
    return out


def logits(folder, adapter=None):
    """By transformers and peft, of a fixed text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits.log_softmax(-1).numpy()


def losses(out):
    return [step["loss"] for step in read_jsonl(out / "metrics.jsonl")]


def references(out, round_index):
    """log pi_ref of the demonstrations, by ordinal."""
    bank = PairBank(out / "pairs")
    return {p.ordinal: p.ref_demo_logp or 0.0 for p in bank.read_round(round_index)}


@pytest.mark.parametrize("merges", [False, True], ids=["keep", "merge"])
@pytest.mark.parametrize("reference", ["round_start", "initial"])
def test_irft(recipe, model, tmp_path, monkeypatch, no_report, merges, reference):
    reads, read = [], Policy.load_weights
    monkeypatch.setattr(Policy, "load_weights", lambda *a: (reads.append(a), read(*a))[1])
    out = train(recipe, tmp_path / "run", **{
        "algorithm.reference": reference, "algorithm.loss": "sigmoid",
    } | (MERGES if merges else {}))
    # A base that was rewritten by merging must be read again for what the run began with.
    assert len(reads) == (2 if merges and reference == "initial" else 1)
    first, _, second, _ = losses(out)
    assert abs(first - math.log(2)) < 1e-6
    before, after = references(out, 0), references(out, 1)
    assert before.keys() == after.keys()
    moved = max(abs(before[i] - after[i]) for i in before)
    if reference == "round_start":
        assert abs(second - math.log(2)) < 1e-6
        assert moved > 1e-2
    else:
        assert abs(second - math.log(2)) > 1e-3
        assert moved < 1e-4
    # hf/ is the base and adapter/ together, and neither is the base.
    ours = logits(out / "hf")
    assert np.abs(ours - logits(model, out / "adapter")).max() < 1e-4
    assert np.abs(ours - logits(model)).max() > 1e-2
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == (8 if merges else 4)
    assert config["lora_alpha"] == (16 if merges else 8)
    started = json.loads((out / "run.json").read_text())["start"]["model.hf"]
    assert json.loads((out / "adapter" / "base.json").read_text())["digest"] == started


@pytest.mark.parametrize("merges", [False, True], ids=["keep", "merge"])
def test_killed_in_a_round_and_resumed(recipe, tmp_path, monkeypatch, no_report, merges):
    changes = {"checkpoint.interval": 1, "algorithm.rounds": 3} | (MERGES if merges else {})
    whole = train(recipe, tmp_path / "whole", **changes)
    broken, target = tmp_path / "broken", "megatron_irl.run.loop.optimizer_step"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, target, 5, after=True)
        train(recipe, broken, **changes)
    train(recipe, broken, **changes)
    assert deterministic(broken) == deterministic(whole)
    for file in ("hf/model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = load_file(whole / file), load_file(broken / file)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("algorithm", ["sft", "spin", "rft"])
def test_other_algorithms(recipe, model, sections, tmp_path, no_report, algorithm):
    own = {"name": algorithm, "rounds": 1}
    if algorithm == "rft":
        own |= {"reward_steps": 2, "policy_steps": 2}
    if algorithm == "sft":
        own |= {"steps_per_round": 2}
    sections["algorithm"] = own
    sections["adapter"]["dropout"] = 0.1
    sections["adapter"]["generation"] = "applied"
    if algorithm != "rft":  # which refuses it
        sections["ddp"] = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    write_recipe(recipe, **sections)
    out = train(recipe, tmp_path / "run")
    ours = logits(out / "hf")
    assert np.abs(ours - logits(model, out / "adapter")).max() < 1e-4
    assert np.abs(ours - logits(model)).max() > 1e-3
    if algorithm == "rft":
        reward, policy = (load_file(out / f / "model.safetensors") for f in ("hf_reward", "hf"))
        assert reward["score.weight"].abs().max() > 0
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(reward[name], policy[name])


def test_goes_on_with_an_adapter_of_pefts(recipe, model, tmp_path, no_report):
    from tests.dist.test_lora import make_adapter

    start = make_adapter(model, tmp_path / "start", ["q_proj", "down_proj"], rank=3)
    whole = {"adapter.rank": "null", "adapter.alpha": "null", "adapter.targets": "all-linear",
             "adapter.path": start}
    out = train(recipe, tmp_path / "run", **whole, **{"algorithm.reference": "initial"})
    assert abs(losses(out)[0] - math.log(2)) < 1e-6
    before, after = references(out, 0), references(out, 1)
    assert max(abs(before[i] - after[i]) for i in before) < 1e-4, "the start was not the reference"
    one, other = (load_file(f / "adapter_model.safetensors") for f in (start, out / "adapter"))
    assert one.keys() == other.keys()
    assert max((one[n] - other[n]).abs().max() for n in one) > 1e-3
    still = train(recipe, tmp_path / "still", **whole, **{"optimizer.lr": 0})
    assert np.abs(logits(still / "hf") - logits(model, start)).max() < 1e-4


def test_wrong_input(recipe, model, tmp_path):
    from tests.dist.test_lora import make_adapter

    def wrong(*changes, named):
        refused("train", recipe, *changes, named=named)

    wrong("adapter.targets=[q_proj,w1]", named=("adapter.targets=w1", "q_proj, k_proj", "lm_head"))
    wrong("adapter.rank=0", named=("adapter.rank=0",))
    wrong("adapter.rank=null", named=("adapter.alpha=8", "adapter.rank or adapter.path"))
    wrong("adapter.merge_each_round=true", named=("algorithm.reset_optimizer",))
    # plan starts no ranks
    refused("plan", recipe, "adapter.targets=lm_head", "parallel.pipeline_model_parallel_size=2",
            named=("adapter.targets=lm_head", "pipeline"))
    tied = make_tiny_llama(tmp_path / "tied", tied=True, layers=2)
    wrong(f"model.hf={tied}", named=("adapter.targets=lm_head", "tie_word_embeddings"))
    wide = make_tiny_llama(tmp_path / "wide", layers=2, hidden=64)
    start = make_adapter(wide, tmp_path / "adapter", ["q_proj"])
    path = f"adapter.path={start}"
    wrong(path, named=("adapter.rank=4", "3"))
    plain = ("adapter.rank=null", "adapter.alpha=null", "adapter.targets=all-linear")
    wrong(path, *plain, named=("another model", "q_proj", "shape"))
    (start / "base.json").write_text(json.dumps({"digest": "0" * 16}))
    wrong(path, *plain, f"model.hf={wide}", named=("another base", "0" * 16))
    (start / "base.json").unlink()
    config = json.loads((start / "adapter_config.json").read_text())
    (start / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    wrong(path, *plain, f"model.hf={wide}", named=("use_dora",))
    (start / "adapter_config.json").write_text(json.dumps(config))
    matrices = load_file(start / "adapter_model.safetensors")
    matrices[next(iter(matrices))].fill_(float("nan"))
    save_file(matrices, start / "adapter_model.safetensors")
    wrong(path, *plain, f"model.hf={wide}", named=("NaN",))
    shutil.rmtree(start)
    wrong(path, *plain, named=("adapter_config.json",))


@pytest.mark.parametrize("merges", [False, True], ids=["keep", "merge"])
def test_score_and_generate_take_adapters(
    recipe, model, tmp_path, monkeypatch, no_report, merges
):
    """The run's checkpoint, its hf/ and its adapter/ say the same."""
    changes = {"checkpoint.interval": 1, "algorithm.rounds": 3} | (MERGES if merges else {})
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.run.loop.finish", 1, after=False)
        train(recipe, out, **changes)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": f"{a}+3", "responses": [str(a + 3), "no"]} for a in range(3)
    ])
    score = ("score", "--pairs", pairs, "--beta", 1, "--precision", "fp32")
    found = {}
    for name in ("checkpoint", "hf", "adapter"):
        folder = out if name == "checkpoint" else out / name
        reference = () if name == "checkpoint" else ("--reference", model)
        result = run(*score, "--model", folder, "--out", tmp_path / name, *reference)
        assert result.code == 0, result.err
        found[name] = np.array([line["rewards"] for line in read_jsonl(tmp_path / name)])
        if name == "checkpoint":
            train(recipe, out, **changes)  # to its end
    assert np.abs(found["hf"]).max() > 0.1
    assert np.abs(found["checkpoint"] - found["hf"]).max() < 1e-3
    assert np.abs(found["adapter"] - found["hf"]).max() < 1e-3
    # An adapter as the reference: of itself, every reward is nothing.
    result = run(*score, "--model", out / "hf", "--reference", out / "adapter",
                 "--out", tmp_path / "self")
    assert result.code == 0, result.err
    assert max(abs(r) for line in read_jsonl(tmp_path / "self") for r in line["rewards"]) < 1e-3
