"""A run refuses what cannot fit, warns of what hardly does, and says what was off afterwards."""

from types import SimpleNamespace

import pytest

from megatron_irl import hardware
from megatron_irl.planning.machines import MACHINES
from megatron_irl.run import opening
from megatron_irl.run.prediction import compared, shortages
from tests.cli.harness import refused, run


def test_what_cannot_fit_is_refused_before_the_data_are_read(
    recipe, tmp_path, monkeypatch, no_report
):
    """Weights, gradients and Adam are 16 bytes a parameter in fp32, of which a tiny model has some
    thousands; the folder is left alone. Known before there are data."""
    from transformers import AutoModelForCausalLM

    from megatron_irl.config import load_recipe

    hf = load_recipe(recipe).model.hf
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(hf).parameters())
    monkeypatch.setattr(hardware, "device_memory", lambda *_: 16 * parameters - 1)
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("not read")
    said = refused("train", recipe, f"data.train={nothing}", named=(
        "cannot fit", "weights", "gradients", "optimizer", "optimizer_cpu_offload=true",
        "parallel.memory_check=warn"))
    assert not (tmp_path / "run").exists(), said
    refused("train", recipe, "parallel.memory_check=perhaps", named=("memory_check=perhaps",))
    result = run("train", recipe, "parallel.memory_check=warn", "evaluation.interval=never",
                 "algorithm.rounds=1")
    assert result.code == 0 and "WARNING: this cannot fit" in result.err, result.err
    monkeypatch.setattr(hardware, "device_memory", lambda *_: 16 * parameters)
    assert run("train", recipe, f"output_dir={tmp_path / 'fits'}", "evaluation.interval=never",
               "algorithm.rounds=1").code == 0


def test_what_hardly_fits_is_warned_of():
    stage = {"stage": 0, "needed": 78 * 2**30, "terms": {"weights": 15 * 2**30,
             "optimizer": 40 * 2**30, "gradients": 20 * 2**30, "graphs": 2**30}}
    plan = {"fits": True, "always_fits": True, "gpu_memory": 79 * 2**30, "verdict": "fits: 78",
            "stages": [stage, stage | {"needed": 2**30}],
            "layouts": [{"overrides": ["parallel.tensor_model_parallel_size=2"]}]}
    (said,) = shortages(plan)
    assert "78.0 of 79.0 GiB" in said and "optimizer 40.0, gradients 20.0, weights 15.0" in said
    assert shortages(plan | {"gpu_memory": 100 * 2**30}) == []
    assert "but not packs" in shortages(plan | {
        "gpu_memory": 100 * 2**30, "always_fits": False, "verdict": "fits, but not packs"})[0]
    (said,) = shortages(plan | {"fits": False, "verdict": "does not fit: 90 of 79 GiB"})
    assert "does not fit: 90" in said and "parallel.tensor_model_parallel_size=2" in said
    assert "No layout" in shortages(plan | {"fits": False, "layouts": []})[0]


def test_no_room_for_a_plan_is_no_reason_to_stop(monkeypatch):
    """It only shows the run; and the main rank makes it alone, while the others go on."""
    def full(*_):
        raise OSError(28, "No space left on device")

    warnings = []
    monkeypatch.setattr(opening, "known_machine", lambda: MACHINES["h100"])
    monkeypatch.setattr(opening, "Prediction", full)
    inputs = SimpleNamespace(recipe=None, data=None)
    topology = SimpleNamespace(is_main=True, world_size=2)
    assert opening.predict(inputs, topology, SimpleNamespace(warn=warnings.append)) is None
    assert ["No space left" in text for text in warnings] == [True]


@pytest.mark.slow
def test_after_the_first_round(recipe, monkeypatch, no_report):
    monkeypatch.setattr("megatron_irl.run.speed.machine_of_device", lambda name: MACHINES["h100"])
    result = run("train", recipe, "evaluation.interval=never", "precision=fp32")
    assert result.code == 0, result.err
    said = [line for line in result.err.splitlines() if "planned and measured" in line]
    assert len(said) == 1, result.err  # after the first of two rounds
    assert "irft step" in said[0] and "generation" in said[0]
    assert "most off the plan is" in result.err  # a CPU is no H100


def test_what_is_off_is_named():
    plan = {"stages": [{"phases": {"training": 40 * 2**30}}], "step_seconds": {"irft": 2.0},
            "generation_tokens_per_second": 1000.0}
    steps = [{"time/step": t, "memory/peak_allocated": 41.0} for t in (9.0, 2.1, 2.0, 2.2)]
    first, second = compared(plan, steps, {"tokens_per_second": 400.0})
    assert "memory while training 40 and 41 GiB; irft step 2 and 2.1 s" in first
    assert "most off the plan is generation: 0.40 times" in second
    assert len(compared(plan, steps, {"tokens_per_second": 1000.0})) == 1
