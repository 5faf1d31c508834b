"""A run that is asked to stop finishes what it is at, saves, ends with code 75, and goes on so."""

import os
import signal
from pathlib import Path

import pytest

from megatron_irl.errors import STOPPED
from megatron_irl.run.time_limit import TimeLimit
from tests.cli.harness import deterministic, read_jsonl, run, write_recipe
from tests.cli.test_resume import pairs_of


def ask_at(monkeypatch, target: str, call: int, number: int = signal.SIGTERM):
    """Send this process a signal at the given call of ``target``; returns the list of calls."""
    import importlib

    module, kind, name = target.rsplit(".", 2)
    owner = getattr(importlib.import_module(module), kind) if kind[0].isupper() else (
        importlib.import_module(f"{module}.{kind}"))
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


@pytest.fixture(scope="module")
def uninterrupted(model, data, tmp_path_factory):
    """The folder of the small recipe's run, with checkpoints at the end of rounds only."""
    from tests.cli.conftest import small_recipe

    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_irl.run.recorder.write_report", lambda folder: folder)
        mapping = small_recipe(model, data, root / "run")
        assert run("train", write_recipe(root / "r.yaml", **mapping)).code == 0
    return root / "run"


STEP = "megatron_irl.train.step.Stepper.train_step"
PART = "megatron_irl.storage.shared_bank.SharedBank.write_part"
SCORE = "megatron_irl.data.round_pairs.RoundPairs.commit"
# where, which call of it, the signal, and the step that the run then stands at
CASES = {
    "in a step": (STEP, 1, signal.SIGTERM, 1),
    "in the last step of a round": (STEP, 2, signal.SIGUSR1, 2),
    "in generation": (PART, 4, signal.SIGINT, 0),  # two are of the held-out prompts
    "in generation of the second round": ("megatron_irl.policy.pairs._sample_share", 4,
                                          signal.SIGHUP, 2),
    "in the reference pass": (SCORE, 1, signal.SIGTERM, 0),
    "in evaluation": ("megatron_irl.evaluation.heldout.Evaluator._greedy_ids", 2, signal.SIGTERM,
                      2),
    "after the last round": ("megatron_irl.run.recorder.Recorder.round", 2, signal.SIGTERM, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_stops_and_goes_on(name, sections, uninterrupted, tmp_path, monkeypatch, no_report):
    target, call, number, step = CASES[name]
    recipe = write_recipe(tmp_path / "r.yaml", **sections)
    folder = Path(sections["output_dir"])
    with monkeypatch.context() as patch:
        calls = ask_at(patch, target, call, number)
        result = run("train", recipe)
        assert result.code == STOPPED, result.err
        assert len(calls) - call <= 1, "it went on"
    message = result.err[result.err.rindex("megatron-irl: ") :]
    assert signal.Signals(number).name in message and f"stopped at step {step}," in message
    assert (", the last, before the export." in message) == (step == 4)
    assert "Traceback" not in result.err and not (folder / "hf").exists()
    if step:
        assert f"step_{step:06d}" in message
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    before = len(read_jsonl(folder / "metrics.jsonl")) if step else 0
    with monkeypatch.context() as patch:
        steps = ask_at(patch, STEP, -1)
        result = run("train", recipe)
        assert result.code == 0, result.err
        assert len(steps) == 4 - before == 4 - step, "steps were taken again"
    assert deterministic(folder) == deterministic(uninterrupted)
    assert pairs_of(folder, 2) == pairs_of(uninterrupted, 2)
    weights = "hf/model.safetensors"
    assert (folder / weights).read_bytes() == (uninterrupted / weights).read_bytes()


def test_a_second_interrupt_ends_the_process_at_once():
    """In a process of its own, which hangs in what no handler can leave."""
    import subprocess
    import sys

    program = (
        "import os, signal, time\n"
        "from megatron_irl.parallel.stop_request import StopRequest\n"
        "with StopRequest().listening() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop.level == 1\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2],
                          timeout=30, check=False)
    assert done.returncode == -signal.SIGINT


def test_a_signal_before_the_run_is_open_stops_it_there(recipe, monkeypatch):
    ask_at(monkeypatch, "megatron_irl.run.inputs.read_inputs", 1)
    result = run("train", recipe)
    assert result.code == STOPPED and "SIGTERM" in result.err


def test_checkpoints_by_the_clock(sections, tmp_path, monkeypatch, no_report):
    """Every step takes longer than the interval, so there is one after each."""
    sections["checkpoint"] = {"interval_minutes": 1e-9, "keep": 100}
    assert run("train", write_recipe(tmp_path / "r.yaml", **sections)).code == 0
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert saved == [f"step_{n:06d}" for n in (1, 2, 3, 4)]


SQUEUE = "#!/bin/sh\necho '{}'\n"


@pytest.mark.parametrize(("left", "near"), [
    ("1:30", True), ("3:30", False), ("1-00:00:00", False), ("UNLIMITED", False), ("59", True),
    ("2:00:00", False), ("INVALID", False),
])
def test_time_left_as_slurm_says(tmp_path, monkeypatch, left, near):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    (tmp_path / "squeue").write_text(SQUEUE.format(left))
    (tmp_path / "squeue").chmod(0o755)
    assert TimeLimit(120).is_near() == near
    assert not TimeLimit(None).is_near()
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert not TimeLimit(120).is_near()


def test_a_limit_that_was_extended(tmp_path, monkeypatch):
    """The environment has the end of the first moment; Slurm is asked before a run is stopped."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    (tmp_path / "squeue").write_text(SQUEUE.format("1:00:00"))
    (tmp_path / "squeue").chmod(0o755)
    assert not TimeLimit(120).is_near()
    (tmp_path / "squeue").write_text(SQUEUE.format("1:00"))
    assert TimeLimit(120).is_near()


def test_the_time_limit_stops_a_run(sections, tmp_path, monkeypatch, no_report):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    sections["checkpoint"] = {"stop_before": 60}
    result = run("train", write_recipe(tmp_path / "r.yaml", **sections))
    assert result.code == STOPPED and "time limit" in result.err
