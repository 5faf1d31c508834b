"""Runs of models with experts: killed, changed over to another layout, and loaded elsewhere."""

import pytest
import torch

from tests.cli import jobs
from tests.cli.harness import deterministic, read_jsonl, run, write_recipe
from tests.cli.test_pipeline_runs import drawn
from tests.cli.test_resume import Killed, kill_after, small
from tests.convert.tiny import make_tiny_llama

EXPERTS_WHOLE = ("tensor_model_parallel_size=2", "sequence_parallel=true",
                 "expert_model_parallel_size=2")
EXPERTS_SLICED = EXPERTS_WHOLE[:2]
STAGES = ("pipeline_model_parallel_size=2",)


def sparse(folder, chosen):
    """A tiny Qwen 3 of four experts, of which every token goes to ``chosen``."""
    return make_tiny_llama(
        folder, family="qwen3_moe", layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=chosen, moe_intermediate_size=16, norm_topk_prob=True,
    )


def test_killed_and_resumed_equals_uninterrupted(sections, tmp_path, monkeypatch, no_report):
    sections["model"]["hf"] = str(sparse(tmp_path / "model", 2))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recipes = [
        write_recipe(tmp_path / f"{folder.name}.yaml", **small(sections, folder))
        for folder in (whole, broken)
    ]
    assert run("train", recipes[0]).code == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.run.loop.optimizer_step", 3, after=True)
        run("train", recipes[1])
    assert run("train", recipes[1]).code == 0
    assert deterministic(broken) == deterministic(whole)
    weights = "hf/model.safetensors"
    assert (broken / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_run_goes_on_under_other_layouts_and_its_folder_loads(pool, sections, tmp_path):
    """A step under each; tokens go to all experts, for rounding decides between two at times."""
    from transformers import AutoModelForCausalLM

    sections["model"]["hf"] = str(sparse(tmp_path / "model", 4))
    recipe = write_recipe(
        tmp_path / "recipe.yaml", **sections | {"checkpoint": {"interval": 1}}
    )

    def arguments(folder, *layout):
        return ["train", str(recipe), f"output_dir={tmp_path / folder}",
                *(f"parallel.{key}" for key in layout)]

    want, got = tmp_path / "want", tmp_path / "got"
    ((code, errors),) = pool.run(1, jobs.command, arguments=arguments("want"))
    assert code == 0, errors
    for layout in (EXPERTS_WHOLE, EXPERTS_SLICED, STAGES):
        pool.run(2, jobs.command_killed, arguments=arguments("got", *layout), steps=1)
    for code, errors in pool.run(2, jobs.command, arguments=arguments("got", *EXPERTS_WHOLE)):
        assert code == 0, errors
    lines, expected = (read_jsonl(folder / "metrics.jsonl") for folder in (got, want))
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["loss"] for line in expected], rel=3e-4)
    assert [s[:2] for s in drawn(got)[0]] == [s[:2] for s in drawn(want)[0]]

    model, info = AutoModelForCausalLM.from_pretrained(
        got / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    reference = AutoModelForCausalLM.from_pretrained(want / "hf", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=2e-3, rtol=1e-3)
