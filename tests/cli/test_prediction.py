"""A run on a known GPU says what was planned and what was measured, and what was off."""

import pytest

from megatron_irl.planning.machines import MACHINES
from megatron_irl.run.prediction import compared
from tests.cli.harness import run


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
