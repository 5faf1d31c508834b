"""One folder, one run: two starts together, a launcher killed outright, what it leaves behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.harness import deterministic, write_recipe
from tools.start_twice import result

ROOT = Path(__file__).parents[2]
WEIGHTS = "hf/model.safetensors"


@pytest.fixture
def start(tmp_path, zygote):
    """Start ``megatron-irl train``; whatever it has started is ended with the test."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = []

    def run(recipe, *overrides, fresh=False):
        if not fresh:
            log = str(tmp_path / f"log{len(started)}")
            process = zygote.start(["train", recipe, *overrides], cwd=str(tmp_path), log=log,
                                   env=environment)
        else:
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_irl", "train", str(recipe), *overrides],
                cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
        started.append(process)
        return process

    yield run
    for process in started:
        for pid in [process.pid, *ours(tmp_path)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def ours(folder) -> list[int]:
    """Processes whose command line names a folder, or that work in it."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes()
            if str(folder).encode() in words or os.readlink(entry / "cwd") == str(folder):
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(true, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def test_one_of_two_that_start_together_runs(sections, finished, start, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", **sections)
    both = [start(recipe) for _ in range(2)]
    codes = sorted(process.wait(timeout=400) for process in both)
    said = {process.pid: process.said for process in both}
    assert codes in ([0, 2], [0, 0]), said
    for process in both:
        text = said[process.pid]
        assert "Traceback" not in text
        if process.returncode == 2:
            (other,) = [p for p in both if p is not process]
            assert f"in use by process {other.pid} on " in text and "since 20" in text
    # Both with code 0: the second came when the first was through, and had nothing to do.
    assert sum("nothing to do" in text for text in said.values()) == (codes == [0, 0])
    folder = tmp_path / "run"
    assert deterministic(folder) == deterministic(finished)
    assert result(folder) == result(finished)  # as the tool compares twenty such pairs
    assert list(folder.glob("lease.*")) == []


def test_ranks_end_with_a_launcher_that_is_killed(sections, finished, start, tmp_path):
    """And the next start goes on at once, with nobody beside it."""
    folder = tmp_path / "run"
    mapping = sections | {"checkpoint": {"interval": 1}}
    recipe = write_recipe(tmp_path / "r.yaml", **mapping)
    launcher = start(recipe, "parallel.data_parallel_size=2")
    wait_until(lambda: list(folder.glob("checkpoints/step_*")))
    assert len(ours(tmp_path)) >= 3
    second = start(recipe)
    assert second.wait(timeout=100) == 2
    assert "in use by process" in second.said
    launcher.send_signal(signal.SIGKILL)
    wait_until(lambda: not ours(tmp_path), 5)
    assert len(list(folder.glob("lease.*"))) == 1
    begun = time.monotonic()
    third = start(recipe)
    wait_until(lambda: [p for p in folder.glob("lease.*") if f'"pid": {third.pid},' in
                        p.read_text()], 60)
    assert time.monotonic() - begun < 60
    assert third.wait(timeout=400) == 0, third.said
    steps = [line["step"] for line in deterministic(folder)]
    assert steps == [line["step"] for line in deterministic(finished)]


def test_a_run_killed_while_saving_leaves_no_process(sections, start, tmp_path):
    folder = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", **sections | {"checkpoint": {"interval": 1}})
    run = start(recipe)
    wait_until(lambda: list(folder.glob("checkpoints/.step_*")) or
               list(folder.glob("checkpoints/step_*")))
    run.send_signal(signal.SIGKILL)
    wait_until(lambda: not ours(tmp_path), 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("after", [0.0, 0.4])
def test_a_signal_in_the_first_instant_leaves_no_rank(sections, start, tmp_path, number, after):
    recipe = write_recipe(tmp_path / "r.yaml", **sections)
    launcher = start(recipe, "parallel.data_parallel_size=2", fresh=True)
    time.sleep(after)
    launcher.send_signal(number)
    launcher.wait(timeout=30)
    wait_until(lambda: not ours(tmp_path), 15)
