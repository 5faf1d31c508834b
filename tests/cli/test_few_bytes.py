"""Runs whose optimizer keeps few bytes a parameter: the same training, and exact resume."""

import pytest

from tests.cli.harness import deterministic, refused, run, write_recipe
from tests.cli.test_lora import LAYERS, check_checkpoint_size
from tests.cli.test_resume import Killed, kill_after

FEW = {"use_precision_aware_optimizer": True}
NARROW = FEW | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "adam_beta2": 0.95}


@pytest.fixture
def start(sections, tmp_path, no_report):
    """(recipe file, run folder) of a small bf16 run, by name, optimizer and changes."""
    def started(name, optimizer, **changes):
        made = sections | {
            "precision": "bf16", "output_dir": str(tmp_path / name),
            "optimizer": sections["optimizer"] | {"lr": 1e-2} | optimizer,
            "checkpoint": {"interval": 1}, "evaluation": {"interval": "never"},
        } | changes
        return write_recipe(tmp_path / f"{name}.yaml", **made), tmp_path / name

    return started


def adapters(sections, *, merge):
    found = {"adapter": {"rank": 4, "alpha": 8, "targets": LAYERS, "merge_each_round": merge}}
    if merge:
        found["algorithm"] = sections["algorithm"] | {"reset_optimizer": "round"}
    return found


@pytest.mark.parametrize("kind", ["full", "adapters", "merged adapters"])
def test_the_same_training_as_with_whole_copies(start, sections, kind):
    """With moments in float32 only what is kept differs: of the copies, half."""
    changes = {} if kind == "full" else adapters(sections, merge=kind.startswith("merged"))
    losses = []
    for name, optimizer in (("whole", {}), ("few", FEW)):
        recipe, out = start(name, optimizer, **changes)
        result = run("train", recipe)
        assert result.code == 0, result.err
        losses.append([step["loss"] for step in deterministic(out)])
        if kind != "full":
            check_checkpoint_size(out)
    # A tie (one number in 65,536) is rounded the other way; nothing else differs.
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=2e-2), "it learns"


@pytest.mark.parametrize("merge", [None, False, True], ids=["full", "adapters", "merged"])
def test_killed_in_a_round_and_resumed(start, sections, monkeypatch, merge):
    changes = {} if merge is None else adapters(sections, merge=merge)
    first, whole = start("whole", NARROW, **changes)
    second, broken = start("broken", NARROW, **changes)
    assert run("train", first).code == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.run.loop.optimizer_step", 3, after=True)
        run("train", second)
    result = run("train", second)
    assert result.code == 0, result.err
    assert deterministic(broken) == deterministic(whole)
    weights = "hf/model.safetensors"
    assert (broken / weights).read_bytes() == (whole / weights).read_bytes()


def test_other_dtypes_are_another_run(start):
    """State of one kind is not read as another."""
    recipe, _ = start("run", NARROW)
    assert run("train", recipe).code == 0
    other, _ = start("run", FEW)
    refused("train", other, named=("exp_avg_dtype", "bf16"))
