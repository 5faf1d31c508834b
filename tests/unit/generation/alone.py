"""Models on this process alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import megatron_irl.hardware  # noqa: F401
from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.load import load_hf_weights
from megatron_irl.generation import SamplingConfig
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.parallel.topology import initialize, shutdown
from tests.unit.generation.exact import EXACT

SAMPLED = SamplingConfig(max_new_tokens=40, seed=3, eos_id=10**6)


@contextmanager
def alone(folder: Path) -> Iterator[tuple[list[Any], Any]]:
    """(chunks, topology) of an HF folder's model."""
    parallel = ParallelConfig()
    topology = initialize(parallel)
    arch = architecture(read_hf_config(folder))
    chunks = build_chunks(build_config(arch, parallel), arch, topology)
    load_hf_weights(chunks, arch, folder, tp_rank=0, tp_size=1)
    yield chunks, topology
    shutdown()


def check_company(
    model: tuple[list[Any], Any], lengths: list[int], *, longest: int, places: int
) -> None:
    """Assert that prompts of these lengths get the samples, to the last bit, that each gets alone.

    Args:
        longest: Tokens of a sequence.
        places: Requests at once, at most.
    """
    chunks, topology = model
    rng = np.random.default_rng(11)
    prompts = [rng.integers(3, 128, n).astype(np.int32) for n in lengths]
    budgets = rng.integers(1, 40, len(prompts)).tolist()

    def sampled(**options):
        generator = MegatronGenerator(
            chunks, topology, max_sequence_length=longest, vocab_size=128, **options
        )
        samples = generator.generate(prompts, SAMPLED, max_new_tokens=budgets)
        generator.close()
        return samples

    expected = sampled(max_requests=1)
    for options in ({"max_requests": 3}, {"max_requests": places, "burst_steps": 8}):
        for got, single in zip(sampled(**options), expected, strict=True):
            np.testing.assert_array_equal(got.token_ids, single.token_ids)
            tolerance = 0 if EXACT else 1e-5
            np.testing.assert_allclose(got.logprobs, single.logprobs, rtol=0, atol=tolerance)
