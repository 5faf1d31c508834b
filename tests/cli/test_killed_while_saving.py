"""A rank killed while its checkpoint is being written in the background."""

import os
import signal
import time

import psutil

from tests.cli.harness import deterministic, run, write_recipe


def test_the_checkpoint_before_is_used_and_nothing_stays(
    sections, finished, tmp_path, no_report, zygote
):
    folder = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", **sections | {"checkpoint": {"interval": 1}})
    flag = tmp_path / "writing"
    process = zygote.start(
        [recipe, flag], module="tests.cli.slow_saving", cwd=str(tmp_path),
        log=str(tmp_path / "log"), env=os.environ | {"MEGATRON_IRL_PLATFORM": "cpu"},
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
