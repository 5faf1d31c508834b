"""Generators on a tiny model."""

import numpy as np
import pytest

import megatron_irl.hardware  # noqa: F401
from megatron_irl.generation.megatron_engine import MegatronGenerator
from tests.convert.tiny import make_tiny_llama
from tests.unit.generation.alone import alone


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model on this process alone: (chunks, topology)."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("hf") / "tiny", layers=2)
    with alone(folder) as model:
        yield model


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
