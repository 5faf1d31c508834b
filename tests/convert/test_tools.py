"""The conversion tools as commands: there under one layout, back under another, bitwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.convert import jobs
from tests.convert.test_round_trip import assert_same_weights
from tests.convert.tiny import make_tiny_llama

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def tool(name: str, *arguments: object, launcher: tuple[str, ...] = ()) -> tuple[int, str]:
    """A real process: the checkpoint writer starts helpers, which re-import the main module."""
    command = [sys.executable, *launcher, str(ROOT / "tools" / name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("tools") / "source", tied=True, seed=31)


def test_there_and_back(source, tmp_path):
    there, back = tmp_path / "megatron", tmp_path / "hf"
    code, errors = tool("convert_hf_to_megatron.py", "--hf", source, "--out", there)
    assert code == 0, errors
    code, errors = tool(
        "convert_megatron_to_hf.py", "--checkpoint", there, "--out", back,
        "--pipeline-model-parallel-size", 2, launcher=TORCHRUN,
    )
    assert code == 0, errors
    assert_same_weights(back, source)
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert len(load_file(back / "model.safetensors")) > 30


@pytest.mark.parametrize(
    ("name", "flag", "given", "out", "said"),
    [
        ("convert_hf_to_megatron.py", "--hf", "nowhere", "new", "nowhere is not a folder"),
        ("convert_hf_to_megatron.py", "--hf", "source", "taken", "exists"),
        ("convert_megatron_to_hf.py", "--checkpoint", "source", "new", "is neither a Megatron"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(
    pool, source, tmp_path, name, flag, given, out, said
):
    (tmp_path / "taken").mkdir()
    model = source if given == "source" else tmp_path / given
    arguments = [flag, str(model), "--out", str(tmp_path / out)]
    ((code, errors),) = pool.run(
        1, jobs.tool, path=str(ROOT / "tools" / name), arguments=arguments
    )
    assert code == 2 and said in errors
    assert errors.startswith(name[:-3] + ": ") and errors.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]
