"""Ranks that hang are noticed: who, where, stacks in the log, then an end; and nothing stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_irl.errors import HUNG
from tests.cli.harness import deterministic, run, write_recipe
from tests.cli.test_ranks import assert_same_run
from tests.cli.test_two_starts import ours

ROOT = Path(__file__).parents[2]


def test_a_stopped_rank(sections, finished, tmp_path, zygote, no_report):
    """Rank 1 gets SIGSTOP after the first step; the run resumes to what it would have been."""
    sections["parallel"] = {"data_parallel_size": 2, "hang_seconds": 8}
    sections["checkpoint"] = {"interval": 1}
    recipe = write_recipe(tmp_path / "r.yaml", **sections)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = zygote.start(["train", recipe], cwd=str(tmp_path), env=environment,
                            log=str(tmp_path / "log"))
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "run" / "checkpoints" / "step_000001").exists():
            assert launcher.poll() is None and time.monotonic() < deadline, launcher.said
            time.sleep(0.02)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGSTOP)
        assert launcher.wait(timeout=120) == HUNG, launcher.said
    finally:
        for pid in ours(tmp_path):
            os.kill(pid, signal.SIGKILL)
    text = launcher.said
    assert "[rank 0 of 2 on" in text and "no progress for" in text and "hang_seconds" in text
    assert f"rank 1 (process {children[1]}) is stopped by a signal (SIGSTOP)" in text
    assert "most recent call first" in text and "loop.py" in text
    assert len(list((tmp_path / "run" / "hangs").glob("*.txt"))) == 1
    again = run("train", recipe, "parallel.data_parallel_size=1")
    assert again.code == 0, again.err
    assert len(deterministic(tmp_path / "run")) == len(deterministic(finished)) == 4


def test_every_living_rank_shows_its_stack(tmp_path, zygote):
    """Two of three wait in a collective for one that does something else; all are alive."""
    launcher = zygote.start(
        [tmp_path], module="tests.cli.hung_rank", cwd=str(tmp_path), log=str(tmp_path / "log"),
        env=os.environ | {"MEGATRON_IRL_PLATFORM": "cpu"})
    assert launcher.wait(timeout=120) == HUNG, launcher.said
    for rank, where in enumerate(["in_the_collective", "in_the_collective", "elsewhere"]):
        text = (tmp_path / f"rank{rank}.log").read_text()
        assert "most recent call first" in text and f" in {where}\n" in text, (rank, text)
    (note,) = (tmp_path / "hangs").glob("*.txt")
    assert "no progress for" in note.read_text() and "in training" in note.read_text()
    assert ours(tmp_path) == []


def test_a_killed_torchrun_leaves_nothing(sections, finished, tmp_path, no_report):
    """Its ranks end with it, while a checkpoint is written too, and the run goes on."""
    sections["checkpoint"] = {"interval": 1}
    recipe = write_recipe(tmp_path / "r.yaml", **sections)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "-m", "megatron_irl", "train", str(recipe)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "wb") as log:
        agent = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=log,
                                 start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not list((tmp_path / "run").glob("checkpoints/.step_*.partial")):
            assert agent.poll() is None and time.monotonic() < deadline, (
                (tmp_path / "log").read_text())
            time.sleep(0.002)
        assert len(ours(tmp_path)) >= 3
        agent.kill()
        agent.wait()
        deadline = time.monotonic() + 10
        while ours(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ours(tmp_path) == []
    finally:
        for pid in ours(tmp_path):
            os.kill(pid, signal.SIGKILL)
    again = run("train", recipe)
    assert again.code == 0, again.err
    assert_same_run(tmp_path / "run", finished)
