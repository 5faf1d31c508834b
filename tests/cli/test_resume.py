"""A run killed and started again ends where the uninterrupted one does, bit for bit."""

import pytest

from megatron_irl.data.pair_bank import PairBank
from tests.cli.harness import deterministic, read_jsonl, run, write_recipe


class Killed(BaseException):
    """Stands for a kill: nothing in the product catches it."""


def kill_after(monkeypatch, target: str, calls: int, *, after: bool):
    """Raise ``Killed`` at the given call of ``target``, before or after it has done its work."""
    module, name = target.rsplit(".", 1)
    import importlib

    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:  # a class of a module
        module, kind = module.rsplit(".", 1)
        owner = getattr(importlib.import_module(module), kind)
    original, count = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        count[0] += 1
        if count[0] == calls and not after:
            raise Killed
        value = original(*args, **kwargs)
        if count[0] == calls:
            raise Killed
        return value

    monkeypatch.setattr(owner, name, wrapped)


def cut_what_begin_writes(patch):
    """Leave half of ``run.json``: what the run began with, ``recipe.yaml`` says too."""
    from megatron_irl.run.folder import RunFolder

    begin = RunFolder.begin

    def and_cut(self, *arguments):
        begin(self, *arguments)
        path = self.path / "run.json"
        path.write_bytes(path.read_bytes()[:50])

    patch.setattr(RunFolder, "begin", and_cut)


def small(sections, folder, **algorithm):
    return sections | {
        "output_dir": str(folder),
        "checkpoint": {"interval": 2},
        "algorithm": sections["algorithm"] | algorithm,
    }


def pairs_of(folder, rounds):
    bank = PairBank(folder / "pairs")
    return [
        (p.ordinal, p.sample_ids.tolist(), p.ref_demo_logp, p.ref_sample_logp)
        for r in range(rounds) for p in bank.read_round(r)
    ]


CASES = {
    "mid-generation": ("megatron_irl.storage.shared_bank.SharedBank.write_part", 2, True, {}),
    "mid-reference": ("megatron_irl.data.round_pairs.RoundPairs.commit", 2, False, {}),
    "mid-round": ("megatron_irl.run.loop.optimizer_step", 3, True, {}),
    "round end": ("megatron_irl.run.run.Run.save", 1, True, {}),
    "initial reference": (
        "megatron_irl.run.loop.optimizer_step", 3, True, {"reference": "initial"}
    ),
    "optimizer reset": (
        "megatron_irl.run.loop.optimizer_step", 3, True, {"reset_optimizer": "round"}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_equals_uninterrupted(
    name, sections, tmp_path, monkeypatch, no_report
):
    target, calls, after, algorithm = CASES[name]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = write_recipe(tmp_path / "whole.yaml", **small(sections, whole, **algorithm))
    second = write_recipe(tmp_path / "broken.yaml", **small(sections, broken, **algorithm))
    assert run("train", first).code == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, target, calls, after=after)
        run("train", second)
    assert not (broken / "hf").exists()
    result = run("train", second)
    assert result.code == 0, result.err
    assert deterministic(broken) == deterministic(whole)
    assert len(read_jsonl(broken / "rounds.jsonl")) == sections["algorithm"]["rounds"]
    assert pairs_of(broken, 2) == pairs_of(whole, 2)
    weights = "hf/model.safetensors"
    assert (broken / weights).read_bytes() == (whole / weights).read_bytes()


def test_first_step_of_every_round_is_ln2(finished):
    import math

    lines = read_jsonl(finished / "metrics.jsonl")
    firsts = [line for line in lines if line["staleness"] == 0]
    assert len(firsts) == 2
    assert all(abs(line["loss/margin"] - math.log(2)) < 1e-5 for line in firsts)
    assert all(line["loss"] == pytest.approx(line["loss/margin"] + 0.3 * line["loss/nll"])
               for line in lines), "irft is anchored unless the recipe says otherwise"


def test_the_folder_says_what_the_run_computed_with(finished):
    import json

    kernels = json.loads((finished / "run.json").read_text())["kernels"]
    assert kernels["layers"] == "local"
    assert kernels["training_attention"] == kernels["generation_attention"] == "SDPA"


def test_finished_run_is_left_alone(finished, monkeypatch):
    """It is said at once: no data is read, and no ranks are started."""
    monkeypatch.setattr("megatron_irl.run.inputs.read_inputs", None)
    monkeypatch.setattr("megatron_irl.cli.run_ranks", None)
    before = (finished / "metrics.jsonl").read_bytes(), (finished / "run.json").stat().st_mtime_ns
    for layout in ("parallel.data_parallel_size=1", "parallel.data_parallel_size=2"):
        result = run("train", finished.parent / "recipe.yaml", layout)
        assert result.code == 0 and "is finished; nothing to do" in result.err
    after = (finished / "metrics.jsonl").read_bytes(), (finished / "run.json").stat().st_mtime_ns
    assert after == before


def test_run_folder_holds_what_the_contract_says(finished):
    expected = {
        "recipe.yaml", "metrics.jsonl", "rounds.jsonl", "pairs", "checkpoints", "hf",
        "report.html", "tensorboard", "wandb",
    }
    assert expected <= {path.name for path in finished.iterdir()}
    line = read_jsonl(finished / "metrics.jsonl")[0]
    assert {
        "step", "round", "loss", "grad_norm", "lr", "reward/demo", "reward/sample",
        "reward/margin", "reward/accuracy", "logp/demo", "logp/sample", "tokens", "time/step",
    } <= set(line)
    assert len(read_jsonl(finished / "rounds.jsonl")) == 2
    page = (finished / "report.html").read_text()
    assert "src=\"http" not in page and "href=\"http" not in page


def test_hf_folder_loads_and_generate_and_score_agree_with_it(finished, tmp_path):
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.cli.harness import write_jsonl

    model = AutoModelForCausalLM.from_pretrained(finished / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(finished / "hf")
    prompts = [{"prompt": [{"role": "user", "content": f"{a}+{a}"}]} for a in range(4)]
    out = tmp_path / "out.jsonl"
    result = run(
        "generate", "--model", finished, "--prompts", write_jsonl(tmp_path / "p.jsonl", prompts),
        "--out", out, "--temperature", 0, "--max-new-tokens", 8,
    )
    assert result.code == 0, result.err
    for record, line in zip(prompts, read_jsonl(out), strict=True):
        assert line["prompt"] == record["prompt"]
        ids = tokenizer.apply_chat_template(
            record["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            greedy = model.generate(**ids, max_new_tokens=8, do_sample=False)
        assert line["token_ids"] == greedy[0, ids["input_ids"].shape[1] :].tolist()
        assert (line["token_ids"][-1] == 1) == (line["finish_reason"] == "stop")
    pairs = [r | {"responses": ["7", "12"]} for r in prompts]
    scored = tmp_path / "scored.jsonl"
    result = run(
        "score", "--model", finished, "--pairs", write_jsonl(tmp_path / "s.jsonl", pairs),
        "--out", scored,
    )
    assert result.code == 0, result.err
    import yaml

    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    reference = AutoModelForCausalLM.from_pretrained(recipe["model"]["hf"], dtype=torch.float32)
    beta = recipe["algorithm"]["beta"][-1]
    for record, line in zip(pairs, read_jsonl(scored), strict=True):
        prompt = tokenizer.apply_chat_template(
            record["prompt"], add_generation_prompt=True, tokenize=False
        )
        for text, reward in zip(record["responses"], line["rewards"], strict=True):
            head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            tail = [*tokenizer(text, add_special_tokens=False)["input_ids"], 1]
            ids = torch.tensor([head + tail])
            with torch.no_grad():
                logps = [
                    m(ids).logits[0, len(head) - 1 : -1].log_softmax(-1)
                    .gather(1, ids[0, len(head) :, None]).sum().item()
                    for m in (model, reference)
                ]
            np.testing.assert_allclose(reward, beta * (logps[0] - logps[1]), atol=1e-4)


def test_unfinished_run_generates_from_its_checkpoint(
    sections, tmp_path, monkeypatch, no_report
):
    from tests.cli.harness import write_jsonl

    folder = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", **small(sections, folder))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.run.run.Run.save", 1, after=True)
        run("train", recipe, "checkpoint.asynchronous=false")
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1+1"}])
    result = run("generate", "--model", folder, "--prompts", prompts, "--out", tmp_path / "o.jsonl",
                 "--max-new-tokens", 4)
    assert result.code == 0, result.err
    assert len(read_jsonl(tmp_path / "o.jsonl")) == 1


def test_the_cut_into_parts_changes_no_sample(sections, tmp_path, no_report):
    """Nor do the places there are: what is drawn depends on the prompt and its number alone."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, (size, requests) in zip(folders, ((256, 64), (3, 2)), strict=True):
        options = small(sections, folder, rounds=1, steps_per_round=1, prompts_per_round=8)
        options["generation"] = sections.get("generation", {}) | {
            "part_size": size, "max_requests": requests,
        }
        assert run("train", write_recipe(tmp_path / f"{folder.name}.yaml", **options)).code == 0
    cut = [len(list((folder / "pairs" / "round_0000").glob("part_*.parquet")))
           for folder in folders]
    assert cut == [1, 3]
    drawn = [[(o, ids) for o, ids, *_ in pairs_of(folder, 1)] for folder in folders]
    assert drawn[0] == drawn[1]
