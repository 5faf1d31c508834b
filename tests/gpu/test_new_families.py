"""Families whose layers differ, on a GPU: either spec, or the local one where there is no other."""

import numpy as np
import pytest
import torch

from tests.convert.tiny import make_tiny_llama
from tests.dist.jobs import random_sequences
from tests.gpu.conftest import NEEDS_GPU, VOCAB
from tests.gpu.models import build, logprobs

pytestmark = [pytest.mark.gpu, NEEDS_GPU]
SIZES = {
    "hidden": 256, "intermediate": 512, "heads": 8, "kv_heads": 4, "layers": 2, "vocab": VOCAB,
    "scale": 0.1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = {"head_dim": 64, "tied": True, "sliding_window": 8}
BOTH = {
    "phi3": {"family": "phi3"},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "yarn": {"rope_scaling": YARN},
}
LOCAL_ONLY = {
    "gemma2": GEMMA | {"family": "gemma2", "attn_logit_softcapping": 2.0},
    "gemma3": GEMMA | {"family": "gemma3_text"},
}


@pytest.mark.parametrize("name", BOTH)
def test_specs_are_equal(setup, tmp_path, name):
    pytest.importorskip("transformer_engine")
    hf = make_tiny_llama(tmp_path / "hf", **SIZES, **BOTH[name])
    te, _ = build(hf, setup[1], precision="bf16", spec="transformer_engine")
    local, _ = build(hf, setup[1], precision="bf16", spec="local")
    difference = np.abs(logprobs(hf, te, setup[1]) - logprobs(hf, local, setup[1]))
    assert difference.mean() < 0.02 and difference.max() < 0.2


@pytest.mark.parametrize("name", [*LOCAL_ONLY, *BOTH])
def test_logprobs_and_greedy_tokens_equal_transformers(setup, tmp_path, name):
    from transformers import AutoModelForCausalLM

    from megatron_irl.generation import SamplingConfig
    from megatron_irl.generation.megatron_engine import MegatronGenerator

    hf = make_tiny_llama(tmp_path / "hf", **SIZES, **(LOCAL_ONLY | BOTH)[name])
    chunks, _ = build(hf, setup[1])  # fp32
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval().cuda()
    sequences, expected = random_sequences(7, 24, VOCAB), []
    for prompt, response in sequences:
        ids = torch.tensor(np.concatenate([prompt, response]))[None].long().cuda()
        with torch.no_grad():
            rows = model(ids).logits[0].log_softmax(-1)
        rows = rows[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])
        expected.append(rows[:, 0].cpu().numpy())
    np.testing.assert_allclose(
        logprobs(hf, chunks, setup[1]), np.concatenate(expected), atol=1e-3
    )
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=16, eos_id=1, seed=3)
    prompts = [prompt for prompt, _ in sequences[:6]]
    with MegatronGenerator(
        chunks, setup[1], max_sequence_length=64, vocab_size=VOCAB
    ) as generator:
        samples = generator.generate(prompts, greedy)
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = torch.tensor(prompt)[None].long().cuda()
        reference = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16,
            eos_token_id=1, pad_token_id=1,
        )
        assert sample.token_ids.tolist() == reference[0, len(prompt) :].tolist()
