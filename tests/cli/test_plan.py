"""``plan`` on a machine that could not run the recipe: everything but its hardware is checked."""

from pathlib import Path

import pytest

from megatron_irl import hardware
from tests.cli.harness import refused, run, write_recipe
from tests.convert.tiny import make_tiny_llama

RECIPE = Path(__file__).parents[2] / "examples" / "llama_70b" / "recipe.yaml"

pytestmark = pytest.mark.skipif(hardware.IS_CUDA, reason="needs a machine without CUDA")


@pytest.fixture(scope="module")
def fp8(data, tmp_path_factory):
    """Arguments that make the example's recipe, FP8 and all, one of a tiny model."""
    root = tmp_path_factory.mktemp("plan")
    model = make_tiny_llama(root / "model", heads=8, kv_heads=8)
    return [RECIPE, f"model.hf={model}", f"data.train={data['train']}", f"data.eval={data['eval']}",
            "data.max_prompt_length=48", "data.max_response_length=8",
            "parallel.data_parallel_size=2", f"output_dir={root / 'run'}"]


def test_fp8_recipe_is_planned_without_a_gpu(fp8, capsys):
    result = run("plan", *fp8)
    assert result.code == 0, result.err
    plan = capsys.readouterr().out
    assert "tensor 8 x pipeline 4 x data 2 = 64 ranks; fp8" in plan
    assert "the hardware was not checked: precision=fp8" in plan


def test_plan_still_checks_what_is_not_the_hardware(fp8):
    refused("plan", *fp8, "model.fp8_recipe=coarse", named=("model.fp8_recipe=coarse", "mxfp8"))
    refused("plan", *fp8, "parallel.tensor_model_parallel_size=16",
            named=("tensor_model_parallel_size=16",))


def test_training_it_here_is_refused(fp8, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # as one rank of a launcher: nothing is started from here
    monkeypatch.setenv("WORLD_SIZE", "64")
    refused("train", *fp8, named=("precision=fp8", "CPU", "bf16 or fp32"))


def test_other_precisions_have_nothing_unchecked(recipe, capsys):
    assert run("plan", recipe).code == 0
    plan = capsys.readouterr().out
    assert "hardware" not in plan
    assert "learning rate 0.001 (optimizer.lr); warmup over 10% of the steps, then linear" in plan


def test_both_learning_rates_of_rft_are_said(sections, tmp_path, capsys):
    sections["algorithm"] = {"name": "rft", "rounds": 2, "reward_steps": 1, "policy_steps": 1}
    del sections["optimizer"]
    recipe = write_recipe(tmp_path / "rft.yaml", **sections, reward={"lr": 2e-4})
    result = run("plan", recipe)
    assert result.code == 0, result.err
    assert ("learning rate 5e-07 (optimizer.lr), of the reward head 0.0002 (reward.lr); "
            in capsys.readouterr().out)
