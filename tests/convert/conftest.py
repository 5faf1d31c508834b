"""Tiny models of a test module, by name; the certifying tool, over ranks of either kind."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_irl.cli.verification import score_as_rank
from tests.convert.tiny import make_tiny_llama

TOOL = Path(__file__).parents[2] / "tools" / "verify_checkpoint.py"


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a model, made once for the module, as its ``options_of`` has it."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny_llama(root / name, **request.module.options_of(name))
        return made[name]

    return make


@pytest.fixture
def verify():
    """The tool's ``main``, whose ranks are processes of their own."""
    return runpy.run_path(str(TOOL))["main"]


@pytest.fixture
def verify_in_pool(verify, pool, tmp_path, monkeypatch):
    """The same on the ranks of the pool, which have made their imports."""

    def in_the_pool(hf_dir, checkpoint, layout, sequences, program):
        (job := tmp_path / "job.json").write_text(json.dumps({
            "hf": str(hf_dir), "checkpoint": str(checkpoint) if checkpoint else None,
            "tp": layout.tp, "pp": layout.pp, "sequences": sequences}))
        pool.run(layout.tp * layout.pp, score_as_rank, job_file=job)
        scores = json.loads(job.with_suffix(".out").read_text())
        return [np.array(score, np.float32) for score in scores]

    monkeypatch.setitem(verify.__globals__, "megatron_logprobs", in_the_pool)
    return verify
