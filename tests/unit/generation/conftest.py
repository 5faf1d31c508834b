"""Generators on a tiny model."""

import numpy as np
import pytest

import megatron_irl.hardware  # noqa: F401
from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.load import load_hf_weights
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.parallel.topology import initialize, shutdown
from tests.convert.tiny import make_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model on this process alone: (chunks, topology)."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("hf") / "tiny", layers=2)
    parallel = ParallelConfig()
    topology = initialize(parallel)
    arch = architecture(read_hf_config(folder))
    chunks = build_chunks(build_config(arch, parallel), arch, topology)
    load_hf_weights(chunks, arch, folder, tp_rank=0, tp_size=1)
    yield chunks, topology
    shutdown()


@pytest.fixture
def make(model):
    """Generators on the tiny model, closed afterwards."""
    made = []

    def build(**options):
        chunks, topology = model
        options = {"max_sequence_length": 48, "vocab_size": 128, "max_requests": 4} | options
        made.append(MegatronGenerator(chunks, topology, **options))
        return made[-1]

    yield build
    for generator in made:
        generator.close()


@pytest.fixture
def prompts():
    rng = np.random.default_rng(11)
    return [rng.integers(3, 128, n).astype(np.int32) for n in (5, 1, 17, 9, 30, 2, 8, 3, 12)]
