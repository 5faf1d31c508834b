"""Commands over several ranks give what one process gives: torchrun, own ranks, every layout."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_irl.data.pair_bank import PairBank
from tests.cli import jobs
from tests.cli.conftest import small_recipe
from tests.cli.harness import deterministic, read_jsonl, run, write_jsonl, write_recipe
from tests.convert.tiny import make_tiny_llama

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
LAYOUTS = {
    "pp2_vpp2": (
        2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    ),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


def samples(folder: Path) -> list[tuple[int, list[int]]]:
    bank = PairBank(folder / "pairs")
    return [(p.ordinal, p.sample_ids.tolist()) for r in (0, 1) for p in bank.read_round(r)]


def assert_same_run(got: Path, expected: Path):
    """The same samples, and metrics that differ by no more than Adam makes of rounding."""
    assert samples(got) == samples(expected)
    assert len(samples(got)) == 16
    ours, theirs = deterministic(got), deterministic(expected)
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            if key == "reward/accuracy" and b["staleness"] == 0:
                continue  # every margin is 0, give or take rounding, and so is its sign
            bound = 5e-3 if key == "grad_norm" else 3e-4
            assert a[key] == pytest.approx(value, rel=bound, abs=1e-4), (a["step"], key)
    for a, b in zip(*(read_jsonl(f / "rounds.jsonl") for f in (got, expected)), strict=True):
        for key, value in b["evaluation"].items():
            assert a["evaluation"][key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
        assert a["mismatch"]["max_abs"] < 1e-4
    assert (got / "hf" / "model.safetensors").exists()


@pytest.fixture
def launched(sections, tmp_path, monkeypatch):
    """The small recipe without its report, and an environment for processes of our own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return write_recipe(tmp_path / "recipe.yaml", **sections)


def test_torchrun(launched, finished, tmp_path):
    command = [sys.executable, *TORCHRUN, "-m", "megatron_irl", "train", str(launched),
               "parallel.pipeline_model_parallel_size=2"]
    launcher = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                                start_new_session=True)
    try:
        _, errors = launcher.communicate(timeout=500)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the ranks too, if they hang
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, errors
    assert_same_run(tmp_path / "run", finished)


def test_the_command_starts_its_own_ranks(launched, finished, tmp_path, capfd):
    result = run("train", launched, "parallel.data_parallel_size=2")
    assert result.code == 0, capfd.readouterr().err
    assert_same_run(tmp_path / "run", finished)
    environment = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "world_size: 2" in environment


@pytest.fixture(scope="module")
def tied(data, tmp_path_factory):
    """A tied model of four layers, its recipe, and the folder of its run on one process."""
    root = tmp_path_factory.mktemp("tied")
    model = make_tiny_llama(root / "model", tied=True, hidden=32, heads=4, kv_heads=2,
                            intermediate=64)
    mapping = small_recipe(model, data, root / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_irl.run.recorder.write_report", lambda folder: folder)
        result = run("train", write_recipe(root / "recipe.yaml", **mapping))
    assert result.code == 0, result.err
    return root


def on_ranks(pool, world_size: int, *arguments: object):
    """Run a command on ranks that a launcher started."""
    for code, errors in pool.run(world_size, jobs.command, arguments=list(map(str, arguments))):
        assert code == 0, errors


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_with_tied_embeddings(pool, tied, tmp_path, name):
    world_size, layout = LAYOUTS[name]
    sizes = [f"parallel.{key}={str(value).lower()}" for key, value in layout.items()]
    on_ranks(pool, world_size, "train", tied / "recipe.yaml", f"output_dir={tmp_path / 'run'}",
             *sizes)
    assert_same_run(tmp_path / "run", tied / "run")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Prompts, and responses to be scored."""
    root = tmp_path_factory.mktemp("files")
    prompts = [{"prompt": f"{a}+{a}" * (1 + a % 3), "id": a} for a in range(9)]
    pairs = [record | {"responses": ["7", "12", "a longer one"]} for record in prompts[:5]]
    return {
        "prompts": write_jsonl(root / "prompts.jsonl", prompts),
        "pairs": write_jsonl(root / "pairs.jsonl", pairs),
    }


SIZES = {
    "tp2": (2, ("--tensor-model-parallel-size", 2)),
    "pp2": (2, ("--pipeline-model-parallel-size", 2)),
    "dp2": (2, ("--data-parallel-size", 2)),
    "tp2_pp2": (4, ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)),
}
COMMANDS = {
    "generate": ("--prompts", "prompts", "--max-new-tokens", 8, "--seed", 11),
    "score": ("--pairs", "pairs"),
}


@pytest.fixture(scope="module")
def answers(tied, files, tmp_path_factory):
    """What one process answers, by command."""
    known = {}

    def of(name):
        if name not in known:
            out = tmp_path_factory.mktemp("answers") / "out.jsonl"
            result = run(*arguments(name, tied, files, out))
            assert result.code == 0, result.err
            known[name] = read_jsonl(out)
        return known[name]

    return of


def arguments(name, tied, files, out):
    given = [files.get(a, a) if isinstance(a, str) else a for a in COMMANDS[name]]
    return [name, "--model", tied / "run", "--out", out, *given]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", COMMANDS)
def test_inference(pool, tied, files, answers, tmp_path, name, sizes):
    world_size, options = SIZES[sizes]
    out = tmp_path / "out.jsonl"
    on_ranks(pool, world_size, *arguments(name, tied, files, out), *options)
    got, expected = read_jsonl(out), answers(name)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        numbers = "logprobs" if name == "generate" else "rewards"
        np.testing.assert_allclose(a.pop(numbers), b.get(numbers), atol=1e-4)
        assert a == {k: v for k, v in b.items() if k != numbers}
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    if name == "score":
        rewards = np.array([line["rewards"] for line in expected])
        assert np.abs(rewards).max() > 1e-3, "rewards near zero would hide a wrong policy"
    else:
        assert len({tuple(line["token_ids"]) for line in expected}) > 5
