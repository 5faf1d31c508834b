"""Samples of models with experts: a function of their prompt, whoever shares the steps."""

import numpy as np
import pytest

import megatron_irl.hardware  # noqa: F401
from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.load import load_hf_weights
from megatron_irl.generation import SamplingConfig
from megatron_irl.generation.graphs import why_not_captured
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.parallel.topology import initialize, shutdown
from tests.convert.test_families import MODELS
from tests.convert.tiny import make_tiny_llama
from tests.unit.generation.test_megatron_engine import EXACT

SAMPLED = SamplingConfig(max_new_tokens=40, seed=3, eos_id=10**6)


@pytest.fixture(params=["mixtral", "qwen3_moe_unnormalised"])
def sparse(request, tmp_path):
    """A tiny mixture on this process alone: (chunks, topology)."""
    folder = make_tiny_llama(tmp_path / "tiny", **MODELS[request.param] | {"layers": 2})
    parallel = ParallelConfig()
    topology = initialize(parallel)
    arch = architecture(read_hf_config(folder))
    chunks = build_chunks(build_config(arch, parallel), arch, topology)
    load_hf_weights(chunks, arch, folder, tp_rank=0, tp_size=1)
    yield chunks, topology
    shutdown()


def test_company_does_not_change_a_bit_of_a_sample(sparse):
    chunks, topology = sparse
    rng = np.random.default_rng(11)
    prompts = [rng.integers(3, 128, n).astype(np.int32) for n in rng.integers(1, 120, 24)]
    budgets = rng.integers(1, 40, len(prompts)).tolist()

    def sampled(**options):
        generator = MegatronGenerator(
            chunks, topology, max_sequence_length=192, vocab_size=128, **options
        )
        samples = generator.generate(prompts, SAMPLED, max_new_tokens=budgets)
        generator.close()
        return samples

    expected = sampled(max_requests=1)
    for options in ({"max_requests": 3}, {"max_requests": 16, "burst_steps": 8}):
        for got, alone in zip(sampled(**options), expected, strict=True):
            np.testing.assert_array_equal(got.token_ids, alone.token_ids)
            tolerance = 0 if EXACT else 1e-5
            np.testing.assert_allclose(got.logprobs, alone.logprobs, rtol=0, atol=tolerance)


def test_no_graphs_are_captured(sparse, monkeypatch):
    chunks, _ = sparse
    monkeypatch.setattr("megatron_irl.hardware.IS_CUDA", True)
    chunks[0].config.params_dtype = None  # anything but fp32
    assert "each expert" in (why_not_captured(chunks, flash_attention=True) or "")
