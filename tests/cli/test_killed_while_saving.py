"""A rank killed while its checkpoint is being written in the background."""

import os
import signal
import subprocess
import sys
import time

import psutil

from tests.cli.harness import deterministic, run, write_recipe
from tests.dist.pool import ROOT

# The command, with a second checkpoint that takes for ever once its first file is begun.
SLOW = """
import sys, time, pathlib
import megatron_irl.run.loop
from megatron_irl.storage import saving
original, calls = saving.write_buckets, []

def write(buckets, folder, **options):
    calls.append(folder)
    if len(calls) == 2:
        (folder / "__0_0.distcp").write_bytes(b"half")
        pathlib.Path(sys.argv[2]).touch()
        time.sleep(600)
    return original(buckets, folder, **options)

saving.write_buckets = write
from megatron_irl.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""


def test_the_checkpoint_before_is_used_and_nothing_stays(
    sections, finished, tmp_path, no_report
):
    folder = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", **sections | {"checkpoint": {"interval": 1}})
    flag = tmp_path / "writing"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(recipe), str(flag)], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MEGATRON_IRL_PLATFORM": "cpu"},
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 240
        while not flag.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert flag.exists(), "the second checkpoint was never begun"
        assert (folder / "checkpoints" / ".step_000002.partial").is_dir()
        started = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)  # the rank alone, not what it started
        process.wait()
    _, alive = psutil.wait_procs(started, timeout=5)
    assert alive == [], "a writer has outlived its rank"
    assert [p.name for p in folder.glob("checkpoints/step_*")] == ["step_000001"]
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert "resuming at step 1" in result.err
    assert list(folder.glob("checkpoints/.*")) == []
    assert deterministic(folder) == deterministic(finished)
    weights = "hf/model.safetensors"
    assert (folder / weights).read_bytes() == (finished / weights).read_bytes()
