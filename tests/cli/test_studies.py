"""A study from file to table, stopped and gone on with."""

import json

import yaml

from studies.__main__ import main


def test_a_study_runs_and_goes_on(tmp_path, capsys):
    study = {
        "name": "tiny", "hypothesis": "two steps teach nothing, whatever they are taken on",
        "task": {"name": "reverse", "train": 16, "validation": 4, "test": 6},
        "model": {"hidden": 32, "layers": 1}, "start": {"steps": 2, "lr": 1e-3, "batch": 4},
        "common": {"steps": 2, "batch": 4}, "seeds": [0], "trial_seed": 7,
        "methods": {"start": {}, "sft": {"grid": {"lr": [1e-3, 1e-4]}},
                    "irft": {"rounds": 2, "beta": 0.1, "grid": {"lr": [1e-3, 1e-4]}}},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    assert main(["run", str(path), "--out", str(out)]) == 0
    results = json.loads((out / "tiny.json").read_text())
    measured = results["levels"][""]["irft"]["seeds"][0]
    assert len(measured["greedy"]) == len(measured["sampled"]) == 6
    assert (out / "tiny.png").exists() and "| irft |" in (out / "tiny.md").read_text()
    points = {p: p.stat().st_mtime_ns for p in out.rglob("points/*/*.json")}
    # Four trials and two chosen ones: how long each took, and its answers; and the start's.
    assert len(points) == 13
    (out / "tiny.json").unlink()
    assert main(["run", str(path), "--out", str(out)]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("points/*/*.json")} == points
    assert json.loads((out / "tiny.json").read_text()) == results
    capsys.readouterr()
