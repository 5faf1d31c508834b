"""The noise experiment's data, its measure, and the whole of it at the size of a few seconds."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from megatron_irl.parallel.topology import shutdown

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "noise_robustness.py"))
SMALL = (
    "--train", "32", "--heldout", "8", "--hidden", "16", "--layers", "1", "--batch", "8",
    "--base-steps", "2", "--steps", "8", "--policy-steps", "1",
)


def test_area_under_curve_by_hand():
    area = TOOL["area_under_curve"]
    assert area(np.array([3.0, 1.0]), np.array([2.0, 0.0])) == 3 / 4
    assert area(np.array([1.0]), np.array([1.0])) == 1 / 2
    assert area(np.array([0.0]), np.array([1.0, 2.0])) == 0


def test_data_is_corrupted_as_said(tmp_path):
    TOOL["make_data"](tmp_path, seed=5, num_train=100, num_heldout=20)
    train, heldout, clean = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout", "eval")
    )
    wrong = [row for row in train if row["response"] != row["prompt"][:-1][::-1]]
    # A word and its reverse may both be victims: then the shuffle leaves the answer right.
    assert len(wrong) == sum(row["corrupted"] for row in train)
    assert 23 <= len(wrong) <= 25
    assert sorted(row["response"] for row in train) == sorted(
        row["prompt"][:-1][::-1] for row in train
    ), "answers are shuffled, not made up"
    assert all(row["response"] == row["answer"] == row["prompt"][:-1][::-1] for row in clean)
    assert all(row["responses"][0] == row["prompt"][:-1][::-1] for row in heldout)
    assert not {row["prompt"] for row in clean} & {row["prompt"] for row in train}


@pytest.fixture
def no_process_group():
    yield
    shutdown()


def test_every_command_of_the_experiment_runs(tmp_path, capsys, no_process_group):
    main = TOOL["main"]
    assert main(["--out", str(tmp_path), "--seeds", "3", *SMALL]) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["seed 3"]["auc"]) == {"rft", "irft", "sft"}
    assert all(0 <= value <= 1 for value in results["seed 3"]["auc"].values())
    assert results["seed 3"]["kept"] == 24
    assert "explicit (rft)" in said and "sft_filtered" in said
    before = (tmp_path / "results.json").read_bytes()
    assert main(["--out", str(tmp_path), "--seeds", "3", *SMALL]) == 0
    assert (tmp_path / "results.json").read_bytes() == before, "what is done is not done again"
