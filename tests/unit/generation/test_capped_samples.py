"""Samples of models with soft caps: a function of their prompt, whoever shares the steps."""

import json

import numpy as np
import pytest

import megatron_irl.hardware  # noqa: F401
from megatron_irl.generation import SamplingConfig
from megatron_irl.generation.megatron_engine import MegatronGenerator
from tests.convert.test_families import MODELS
from tests.convert.tiny import make_tiny_llama
from tests.unit.generation.alone import alone
from tests.unit.generation.exact import EXACT

SAMPLED = SamplingConfig(max_new_tokens=40, seed=3, eos_id=10**6)


@pytest.fixture(scope="module")
def capped(tmp_path_factory):
    """A tiny Gemma 2 on this process alone, every second layer with a window."""
    options = MODELS["gemma2"] | {"layers": 2, "sliding_window": 100}
    folder = make_tiny_llama(tmp_path_factory.mktemp("hf") / "tiny", **options)
    config = json.loads((folder / "config.json").read_text())
    assert config["attn_logit_softcapping"] and config["final_logit_softcapping"]
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    with alone(folder) as model:
        yield model


def test_company_does_not_change_a_bit_of_a_capped_sample(capped):
    chunks, topology = capped
    rng = np.random.default_rng(11)
    lengths = [1, 700, 20, 370, 3, 120, 385, 16, 460, 90, 33, 2]  # also past what is one piece
    prompts = [rng.integers(3, 128, n).astype(np.int32) for n in lengths]
    budgets = rng.integers(1, 40, len(prompts)).tolist()

    def sampled(**options):
        generator = MegatronGenerator(
            chunks, topology, max_sequence_length=768, vocab_size=128, **options
        )
        samples = generator.generate(prompts, SAMPLED, max_new_tokens=budgets)
        generator.close()
        return samples

    expected = sampled(max_requests=1)
    for options in ({"max_requests": 3}, {"max_requests": 12, "burst_steps": 8}):
        for got, single in zip(sampled(**options), expected, strict=True):
            np.testing.assert_array_equal(got.token_ids, single.token_ids)
            tolerance = 0 if EXACT else 1e-5
            np.testing.assert_allclose(got.logprobs, single.logprobs, rtol=0, atol=tolerance)
