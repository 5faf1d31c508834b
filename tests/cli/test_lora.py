"""Runs with adapters, as users meet them: products, references, rounds, resume, wrong input."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_irl.config import load_recipe
from megatron_irl.convert.hf_config import architecture
from megatron_irl.convert.safe_metadata import read_metadata
from megatron_irl.data.pair_bank import PairBank
from megatron_irl.planning.machines import MACHINES
from megatron_irl.planning.plan import make_plan
from megatron_irl.planning.workload import Lengths
from megatron_irl.policy.policy import Policy
from tests.cli import jobs
from tests.cli.harness import deterministic, read_jsonl, refused, run, write_jsonl, write_recipe
from tests.cli.test_resume import Killed, cut_what_begin_writes, kill_after
from tests.convert.jobs import tool as tool_job
from tests.convert.tiny import make_tiny_llama

ROOT = Path(__file__).parents[2]
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


def losses(out, key="loss"):
    return [step[key] for step in read_jsonl(out / "metrics.jsonl")]


def references(out, round_index):
    """log pi_ref of the demonstrations, by ordinal."""
    bank = PairBank(out / "pairs")
    return {p.ordinal: p.ref_demo_logp or 0.0 for p in bank.read_round(round_index)}


def check_checkpoint_size(out):
    """What is stored is what the planner says: adapters and their Adam, and none of the base."""
    recipe = load_recipe(out / "recipe.yaml", check_files=False)
    arch = architecture(json.loads(open(f"{recipe.model.hf}/config.json").read()))
    plan = make_plan(recipe, arch, MACHINES["h100"], Lengths.equal(8, 4, 16, ""),
                     data_parallel_size=1)
    folder = max((out / "checkpoints").glob("step_*"))
    stored = read_metadata(folder).state_dict_metadata.values()
    tensors = [entry for entry in stored if hasattr(entry, "size")]
    held = sum(e.size.numel() * e.properties.dtype.itemsize for e in tensors)
    assert held == pytest.approx(plan.files["checkpoint"], abs=100 * len(tensors))
    matrices = load_file(out / "adapter" / "adapter_model.safetensors")
    rounds = 2 if recipe.adapter.merge_each_round else 1  # side by side
    assert rounds * plan.files["adapter"] == sum(t.nbytes for t in matrices.values())
    on_disk = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    assert held < on_disk < held + 4096 * len(tensors)  # each tensor is a small archive


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
    first, _, second, _ = losses(out, "loss/margin")
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
    check_checkpoint_size(out)
    started = json.loads((out / "run.json").read_text())["start"]["model.hf"]
    assert json.loads((out / "adapter" / "base.json").read_text())["digest"] == started


@pytest.mark.parametrize(("merges", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.5)],
                         ids=["keep", "merge", "dropout"])
def test_killed_in_a_round_and_resumed(
    recipe, tmp_path, monkeypatch, no_report, merges, dropout
):
    changes = {"checkpoint.interval": 1, "algorithm.rounds": 3, "adapter.dropout": dropout}
    changes |= MERGES if merges else {}
    whole = train(recipe, tmp_path / "whole", **changes)
    broken, target = tmp_path / "broken", "megatron_irl.run.loop.optimizer_step"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, target, 5, after=True)
        if merges:
            cut_what_begin_writes(patch)
        train(recipe, broken, **changes)
    train(recipe, broken, **changes)
    assert deterministic(broken) == deterministic(whole)
    if dropout:  # in training, and nowhere else: later rounds are sampled and scored without
        rounds = read_jsonl(whole / "rounds.jsonl")
        assert max(one["mismatch"]["max_abs"] for one in rounds) < 1e-4
        plain = train(recipe, tmp_path / "plain", **changes | {"adapter.dropout": 0})
        assert losses(plain)[0] == pytest.approx(losses(whole)[0])  # B is nothing yet
        assert losses(plain)[1] != pytest.approx(losses(whole)[1], rel=1e-4)
    for file in ("hf/model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = load_file(whole / file), load_file(broken / file)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_killed_under_tp2_and_resumed_under_dp2(recipe, tmp_path, pool):
    """In the middle of a round; the losses go on as they would have."""
    def command(out, **parallel):
        return ["train", str(recipe), f"output_dir={out}", "checkpoint.interval=1",
                *(f"parallel.{name}={size}" for name, size in parallel.items())]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tp2 = {"tensor_model_parallel_size": 2}
    for code, errors in pool.run(2, jobs.command, arguments=command(whole, **tp2)):
        assert code == 0, errors
    pool.run(2, jobs.command_killed, arguments=command(broken, **tp2), steps=3)
    assert 2 <= len(losses(broken)) <= 3  # of four, the round's second one is open
    for code, errors in pool.run(2, jobs.command, arguments=command(broken, data_parallel_size=2)):
        assert code == 0, errors
    assert np.abs(np.array(losses(broken)) - losses(whole)).max() < 1e-4
    one, other = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (whole, broken))
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-3


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
    assert abs(losses(out, "loss/margin")[0] - math.log(2)) < 1e-6
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


def greedy(folder, prompts, out):
    result = run("generate", "--model", folder, "--prompts", prompts, "--out", out, "--temperature",
                 0, "--max-new-tokens", 6, "--precision", "fp32")
    assert result.code == 0, result.err
    return read_jsonl(out)


def assert_same_answers(one, other):
    for a, b in zip(one, other, strict=True):
        assert a["token_ids"] == b["token_ids"]
        np.testing.assert_allclose(a["logprobs"], b["logprobs"], atol=1e-3)


def check_conversion(pool, run_folder, out):
    tool = str(ROOT / "tools" / "convert_megatron_to_hf.py")
    arguments = ["--checkpoint", str(run_folder), "--out", str(out)]
    identity = run_folder / "run.json"
    whole = identity.read_bytes()
    identity.write_bytes(whole[:50])  # cut: recipe.yaml says what the run began with, too
    ((code, errors),) = pool.run(1, tool_job, path=tool, arguments=arguments)
    identity.write_bytes(whole)
    assert code == 0, errors
    ((code, errors),) = pool.run(1, tool_job, path=tool, arguments=arguments)
    assert code == 2 and "exists" in errors
    checkpoint = max((run_folder / "checkpoints").glob("step_*"))
    away = shutil.copytree(checkpoint, out.with_name("away") / "x" / checkpoint.name)
    ((code, errors),) = pool.run(1, tool_job, path=tool, arguments=[
        "--checkpoint", str(away), "--out", str(out.with_name("none"))])
    assert code == 2 and "recipe.yaml" in errors and not out.with_name("none").exists()


def assert_same_matrices(made, expected):
    (one, other) = (load_file(next(f.glob("*.safetensors"))) for f in (made, expected))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (expected / "tokenizer.json").exists() or (made / "tokenizer.json").is_file()


def test_generates_with_an_adapter_that_peft_trained(model, tmp_path):
    """Greedy answers are transformers' and peft's own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.dist.test_lora import make_adapter

    adapter = make_adapter(model, tmp_path / "adapter", ["q_proj", "up_proj", "lm_head"])
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [
        {"prompt": f"{a}+4"} for a in range(4)])
    ours = greedy(adapter, prompts, tmp_path / "out.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(model)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter).eval()
    for line in ours:
        ids = list(tokenizer(line["prompt"])["input_ids"])  # plain text, no turn of a chat
        for token in line["token_ids"]:
            with torch.no_grad():
                logits = theirs(torch.tensor([ids])).logits[0, -1]
            assert token == int(logits.argmax())
            ids.append(token)
    base = greedy(model, prompts, tmp_path / "base.jsonl")
    assert [a["logprobs"] for a in base] != [a["logprobs"] for a in ours]


@pytest.mark.parametrize("merges", [False, True], ids=["keep", "merge"])
def test_score_and_generate_take_adapters(
    recipe, model, tmp_path, monkeypatch, no_report, merges, pool
):
    """The run's checkpoint, its hf/ and its adapter/ say the same, and so does what the tool makes
    of the checkpoint."""
    changes = {"checkpoint.interval": 1, "algorithm.rounds": 3} | (MERGES if merges else {})
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.run.loop.finish", 1, after=False)
        train(recipe, out, **changes)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": f"{a}+3", "responses": [str(a + 3), "no"]} for a in range(3)
    ])
    score = ("score", "--pairs", pairs, "--beta", 1, "--precision", "fp32")
    found, answers = {}, {}
    for name in ("checkpoint", "hf", "adapter"):
        folder = out if name == "checkpoint" else out / name
        reference = () if name == "checkpoint" else ("--reference", model)
        result = run(*score, "--model", folder, "--out", tmp_path / name, *reference)
        assert result.code == 0, result.err
        found[name] = np.array([line["rewards"] for line in read_jsonl(tmp_path / name)])
        answers[name] = greedy(folder, pairs, tmp_path / f"{name}_answers")
        if name == "checkpoint":
            check_conversion(pool, out, tmp_path / "converted")
            train(recipe, out, **changes)  # to its end
    assert np.abs(found["hf"]).max() > 0.1
    assert np.abs(found["checkpoint"] - found["hf"]).max() < 1e-3
    assert np.abs(found["adapter"] - found["hf"]).max() < 1e-3
    for one in (out / "hf", out / "adapter"):
        made = tmp_path / "converted" / ("" if one.name == "hf" else "adapter")
        assert_same_matrices(made, one)
    assert_same_answers(answers["checkpoint"], answers["hf"])
    assert_same_answers(answers["adapter"], answers["hf"])
    # An adapter as the reference: of itself, every reward is nothing.
    result = run(*score, "--model", out / "hf", "--reference", out / "adapter",
                 "--out", tmp_path / "self")
    assert result.code == 0, result.err
    assert max(abs(r) for line in read_jsonl(tmp_path / "self") for r in line["rewards"]) < 1e-3
