"""The conversion tools as commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert import jobs
from tests.convert.test_round_trip import assert_same_weights
from tests.convert.tiny import make_tiny_llama

ROOT = Path(__file__).parents[2]


def tool(name: str, *arguments: object) -> tuple[int, str]:
    """Exit code and output of a tool as a command."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("tools") / "source", tied=True, seed=31)


def test_there_and_back(source, tmp_path):
    there, back = tmp_path / "megatron", tmp_path / "hf"
    code, said = tool("convert_hf_to_megatron.py", "--hf", source, "--out", there, "--dry-run")
    assert code == 0 and "LlamaForCausalLM, 4 layers" in said and "GB as float32" in said, said
    assert list(tmp_path.iterdir()) == []
    code, said = tool("convert_hf_to_megatron.py", "--hf", source, "--out", there)
    assert code == 0, said
    code, said = tool(
        "convert_megatron_to_hf.py", "--checkpoint", there, "--out", back, "--max-shard-gb", 1e-4
    )
    assert code == 0, said
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 3
    assert_same_weights(back, source)
    note = json.loads((back / "conversion.json").read_text())
    assert note["converted_from"] == str((there / "release").resolve())


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
    """Run in a worker, which has torch already."""
    (tmp_path / "taken").mkdir()
    model = source if given == "source" else tmp_path / given
    arguments = [flag, str(model), "--out", str(tmp_path / out)]
    ((code, errors),) = pool.run(
        1, jobs.tool, path=str(ROOT / "tools" / name), arguments=arguments
    )
    assert code == 2 and said in errors
    assert errors.startswith(name[:-3] + ": ") and errors.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]
