"""What stops a run half-way: a loss that is not finite, a full disk. Message, code 2, resumable."""

import dataclasses
import errno
import importlib
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import small_recipe
from tests.cli.harness import Result, deterministic, read_jsonl, run, snapshot, write_recipe

WEIGHTS = "hf/model.safetensors"


class Stopped:
    """A run that was stopped once: its result, and the command to go on with."""

    def __init__(self, folder: Path, recipe: Path, result: Result):
        self.folder, self.recipe, self.result = folder, recipe, result


def start(model, data, root: Path, patch, **sections) -> Stopped:
    """Run the small recipe without its report."""
    patch.setattr("megatron_irl.run.recorder.write_report", lambda folder: folder)
    folder = root / "run"
    recipe = write_recipe(root / "recipe.yaml", **(small_recipe(model, data, folder) | sections))
    return Stopped(folder, recipe, run("train", recipe))


def assert_clean(stopped: Stopped, *named: str):
    """Code 2, one message with these words, nothing half-written."""
    assert stopped.result.code == 2, stopped.result.err
    assert "Traceback" not in stopped.result.err
    message = stopped.result.err[stopped.result.err.rindex("megatron-irl: ") :]
    for word in named:
        assert word in message, f"{word!r} is not in {message!r}"
    assert not (stopped.folder / "hf").exists()
    assert [p for p in stopped.folder.rglob(".*") if p.name != ".metadata"] == []
    for log in ("metrics.jsonl", "rounds.jsonl"):
        path = stopped.folder / log
        if path.exists():
            assert read_jsonl(path) is not None and path.read_bytes()[-1:] in (b"", b"\n")


def assert_resumes(stopped: Stopped, finished: Path, patch):
    """The same command ends where the uninterrupted run did."""
    patch.setattr("megatron_irl.run.recorder.write_report", lambda folder: folder)
    result = run("train", stopped.recipe)
    assert result.code == 0, result.err
    assert deterministic(stopped.folder) == deterministic(finished)
    assert len(read_jsonl(stopped.folder / "rounds.jsonl")) == 2
    assert (stopped.folder / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


# --- a loss that is not finite


@pytest.fixture(scope="module")
def diverged(model, data, tmp_path_factory):
    """Runs whose loss is ``value`` at ``step``, whatever the policy says; each run once."""
    known = {}

    def make(value: float, step: int) -> Stopped:
        if (value, step) not in known:
            from megatron_irl.run import loop

            original = loop.optimizer_step

            def poisoned(running, phase, work):
                def bad(logprobs_R, batch):
                    out = work.objective(logprobs_R, batch)
                    return type(out)(out.total * value, out.weight, out.metrics)

                if running.state.step + 1 == step:
                    original(running, phase, dataclasses.replace(work, objective=bad))
                else:
                    original(running, phase, work)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "optimizer_step", poisoned)
                root = tmp_path_factory.mktemp("diverged")
                known[value, step] = start(model, data, root, patch)
        return known[value, step]

    return make


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_bad_loss_before_any_checkpoint(diverged, value):
    stopped = diverged(value, 1)
    assert_clean(stopped, f"the loss is {value}", "at step 1", "round 0", "0 steps into it",
                 "the starting model", "optimizer.lr", "training stopped")
    assert not (stopped.folder / "metrics.jsonl").exists()
    assert list(stopped.folder.glob("checkpoints/*")) == []


@pytest.mark.parametrize("value", [NAN, INF])
def test_bad_loss_keeps_the_last_good_state(diverged, value):
    stopped = diverged(value, 4)
    last = stopped.folder / "checkpoints" / "step_000002"
    assert_clean(stopped, f"the loss is {value}", "at step 4", "round 1", "1 steps into it",
                 str(last))
    assert [p.name for p in last.parent.iterdir()] == [last.name]
    assert [line["step"] for line in read_jsonl(stopped.folder / "metrics.jsonl")] == [1, 2, 3]
    assert len(read_jsonl(stopped.folder / "rounds.jsonl")) == 1


@pytest.mark.parametrize("step", [1, 4])
def test_run_with_a_bad_loss_resumes(diverged, finished, monkeypatch, step):
    assert_resumes(diverged(NAN, step), finished, monkeypatch)


def test_weights_that_blew_up_are_not_saved(model, data, tmp_path, monkeypatch):
    """The real thing: an update that ruins the weights is found before they become a checkpoint."""
    stopped = start(model, data, tmp_path, monkeypatch, optimizer={"lr": 1e30},
                    schedule={"lr_warmup_fraction": 0.0}, checkpoint={"interval": 1})
    assert_clean(stopped, "not finite", "round 0", "1 steps into it", "optimizer.lr")
    assert list(stopped.folder.glob("checkpoints/*")) == []
    assert [line["step"] for line in read_jsonl(stopped.folder / "metrics.jsonl")] == [1]


def test_real_divergence_says_where(model, data, tmp_path, monkeypatch):
    stopped = start(model, data, tmp_path, monkeypatch, optimizer={"lr": 1e30},
                    schedule={"lr_warmup_fraction": 0.0})
    assert_clean(stopped, "the loss is nan", "at step 2", "round 0", "1 steps into it")


# --- a full disk


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of 32 MiB, really."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path):
    """Write until nothing more fits."""
    with open(disk / "filler", "ab", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(b"\0" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                size //= 2


# What is being written when space runs out -> (what writes it, at which call, words of the message)
BANK = "megatron_irl.data.pair_bank.PairBank.write_part"
FULL = {
    "held-out samples": (BANK, 2, ("heldout/round_0000/part_00001.parquet",)),
    "pairs": (BANK, 4, ("pairs/round_0000/part_00001.parquet",)),
    "references": (BANK, 7, ("pairs/round_0000/part_00001.parquet",)),
    "metrics": ("megatron_irl.run.runlog.RunLog.log_metrics", 1, ("metrics.jsonl",)),
    "rounds": ("megatron_irl.run.runlog.RunLog.log_round", 1, ("rounds.jsonl",)),
    "first checkpoint": ("megatron_irl.storage.checkpoint.Checkpointer.save", 1, ("step_000002",)),
    "second checkpoint": ("megatron_irl.storage.checkpoint.Checkpointer.save", 2, ("step_000004",)),
    "hf": ("megatron_irl.run.loop.export_hf", 1, ("hf",)),
}


@pytest.fixture(scope="module")
def filled(model, data, small_disk):
    """Runs on the small disk, which fills up just before a certain write; each run once."""
    known = {}

    def make(name: str) -> Stopped:
        if name not in known:
            target, calls, _ = FULL[name]
            owner, method = owner_of(target)
            original, count = getattr(owner, method), [0]

            def write(*args, **kwargs):
                count[0] += 1
                if count[0] == calls:
                    fill(small_disk)
                return original(*args, **kwargs)

            root = small_disk / name.replace(" ", "_")
            root.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, method, write)
                # In the background the next write of the run could be the first to fail.
                known[name] = start(
                    model, data, root, patch, checkpoint={"asynchronous": False}
                )
            assert count[0] >= calls, "the write never happened"
            (small_disk / "filler").unlink()
        return known[name]

    return make


def owner_of(target: str):
    """The module or class that holds a dotted name, and the last part of it."""
    path, method = target.rsplit(".", 1)
    try:
        return importlib.import_module(path), method
    except ModuleNotFoundError:
        module, kind = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), kind), method


@pytest.mark.parametrize("name", FULL)
def test_full_disk(filled, name):
    stopped = filled(name)
    assert_clean(stopped, "No space left on device", *FULL[name][2])
    expected = {"second checkpoint": ["step_000002"], "hf": ["step_000002", "step_000004"]}
    found = sorted(p.name for p in stopped.folder.glob("checkpoints/*"))
    assert found == expected.get(name, [])


@pytest.mark.parametrize("name", FULL)
def test_run_on_a_full_disk_resumes(filled, finished, monkeypatch, name):
    assert_resumes(filled(name), finished, monkeypatch)


# --- somebody else's folder


@pytest.mark.parametrize(
    "override", ["algorithm.beta=0.2", "seed=4", "optimizer.lr=2e-3", "model.attention_dropout=0.1"]
)
def test_folder_of_another_recipe(finished, override):
    before = snapshot(finished)
    result = run("train", finished.parent / "recipe.yaml", override)
    assert result.code == 2
    assert f"output_dir={finished} belongs to another recipe" in result.err
    assert "recipe.yaml" in result.err and "Set output_dir" in result.err
    assert snapshot(finished) == before


def test_plan_of_another_recipe_than_the_folder_s(finished, capsys):
    before = snapshot(finished)
    result = run("plan", finished.parent / "recipe.yaml", "optimizer.lr=2e-3")
    assert result.code == 0, result.err
    note, *plan = capsys.readouterr().out.splitlines()
    assert note.startswith(f"train would refuse this: output_dir={finished} belongs to another")
    assert "optimizer.lr=0.001 there and 0.002 now" in note and len(plan) > 9
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    "override", ["logging.interval=5", "checkpoint.keep=9", "train.micro_batch_size=1"]
)
def test_settings_that_are_not_the_experiment_may_change(finished, override):
    before = snapshot(finished)
    result = run("train", finished.parent / "recipe.yaml", override)
    assert result.code == 0 and "is finished" in result.err
    assert snapshot(finished) == before


@pytest.mark.parametrize("text", ["", "{", "[1]", '"finished"'])
def test_identity_that_cannot_be_read(recipe, tmp_path, text):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(text)
    result = run("train", recipe)
    assert result.code == 2 and "Set output_dir" in result.err
    assert [p.name for p in folder.iterdir()] == ["run.json"]
