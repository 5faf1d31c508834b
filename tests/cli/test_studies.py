"""A study from file to table, stopped and gone on with."""

import json
import runpy
from pathlib import Path

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


def test_drafts_that_nobody_edited_are_samples_of_the_start(tmp_path, capsys):
    common = {"steps": 2, "batch": 4, "lr": 1e-3}
    study = {
        "name": "drafts", "hypothesis": "none",
        "task": {"name": "mirror", "train": 12, "validation": 4, "test": 4, "unedited": 0.5},
        "model": {"hidden": 32, "layers": 1},
        "start": {"before": 64, "habit": 0.8, "steps": 20, "lr": 1e-2, "batch": 8},
        "common": common, "seeds": [0], "trial_seed": 7,
        "methods": {
            "sft": {}, "irft": {"rounds": 1, "beta": 0.1},
            "rft": {"rounds": 1, "beta": 0.1, "head_lr": 1e-2, "policy_steps": 1, "samples": 2},
            "filtered": {"keep": 0.5, "reward": {
                "steps": 2, "batch": 4, "lr": 1e-3, "rounds": 1, "beta": 0.1, "head_lr": 1e-2,
                "policy_steps": 0}},
            "smoothed": {"smoothing": 0.2}, "spin": {"rounds": 1, "beta": 0.1},
            "best": {"kind": "best_of", "n": 2,
                     "draws": common | {"kind": "sft"},
                     "judge": common | {"kind": "irft", "rounds": 1, "beta": 0.1}}},
    }
    path = tmp_path / "drafts.yaml"
    path.write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    demo = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "demo.py"))["main"]
    assert demo(["--out", str(out), "--study", str(path), "--jobs", "1"]) == 0
    (mixed,) = (p.parent for p in out.rglob("drafts.jsonl"))
    demonstrations, drafts = (
        [json.loads(line) for line in (mixed / name).read_text().splitlines()]
        for name in ("train.jsonl", "drafts.jsonl"))
    answers = {line["prompt"]: line["response"] for line in drafts}
    edited = [d for d in demonstrations if d["response"] == d["prompt"][-2::-1]]
    left = [d for d in demonstrations if d["response"] == answers[d["prompt"]]]
    assert len(demonstrations) == len(drafts) == 12 and len(edited) >= 6
    assert {d["prompt"] for d in edited + left} == set(answers)
    assert all(d["is_right"] == (d in edited) for d in demonstrations)
    methods = json.loads((out / "drafts.json").read_text())["levels"][""]
    areas = [methods[name]["seeds"][0]["auc"] for name in ("irft", "rft")]
    wrong = any(not d["is_right"] for d in demonstrations)
    assert all(0 <= a <= 1 if wrong else a is None for a in areas)
    assert len((next(out.rglob("kept.jsonl"))).read_text().splitlines()) >= 6
    assert "$ megatron-irl train" in next(out.rglob("log.txt")).read_text()
    said, page = capsys.readouterr().out, (out / "report.html").read_text()
    assert "$ megatron-irl" not in said and "minutes" in said
    assert (out / "results.md").read_text().strip() in said
    assert "data:image/png;base64," in page and page.count("<tr>") == 1 + 7 + 1 + 3
    # What judges is irft's run, and what it took are answers that sft gave.
    assert len(list(out.glob("points/irft-*"))) == 1
    (rewards,) = out.glob("points/best_of-*/test/rewards.jsonl")
    given = [json.loads(line) for line in
             rewards.with_name("to_score.jsonl").read_text().splitlines()]
    assert [len(line["responses"]) for line in given] == [2 * 8] * 4
    assert len(rewards.read_text().splitlines()) == 4
