"""Samples of models with experts: a function of their prompt, whoever shares the steps."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import megatron_irl.hardware  # noqa: F401
from megatron_irl.generation import cache_size, every_expert
from megatron_irl.generation.engine import Controller
from megatron_irl.generation.megatron_engine import MegatronGenerator
from tests.convert.test_families import MODELS
from tests.convert.tiny import make_tiny_llama
from tests.unit.generation.alone import SAMPLED, alone, check_company

from megatron.core.inference.text_generation_controllers.text_generation_controller import (  # isort: skip  # noqa: E501
    TextGenerationController,
)


@pytest.fixture(params=["mixtral", "qwen3_moe_unnormalised"])
def sparse(request, tmp_path):
    """A tiny mixture on this process alone: (chunks, topology)."""
    folder = make_tiny_llama(tmp_path / "tiny", **MODELS[request.param] | {"layers": 2})
    with alone(folder) as model:
        yield model


def test_company_does_not_change_a_bit_of_a_sample(sparse):
    lengths = np.random.default_rng(11).integers(1, 120, 24).tolist()
    check_company(sparse, lengths, longest=192, places=16)


def test_small_steps_go_to_all_experts_and_large_ones_do_not(sparse, monkeypatch):
    (chunk,), _ = sparse
    chunk.eval()
    layer, asked = chunk.decoder.layers[0].mlp, []
    original = every_expert._to_all
    monkeypatch.setattr(cache_size, "ALL_EXPERTS_TOKENS", 9)
    monkeypatch.setattr(
        every_expert, "_to_all", lambda *a, **k: asked.append(len(a[1])) or original(*a, **k)
    )
    for rows in (1, 9, 10, 40):
        hidden = torch.randn(rows, 1, layer.config.hidden_size)
        with torch.no_grad():
            expected, bias = layer(hidden)
            with every_expert.every_expert(chunk):
                got, none = layer(hidden)
        assert bias is none is None
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert asked == [1, 9]
    assert "forward" not in vars(layer), "as it was"


def test_most_tokens_is_bounded_by_memory_too():
    config = SimpleNamespace(
        expert_model_parallel_size=1, expert_tensor_parallel_size=1, ffn_hidden_size=14336,
        hidden_size=4096, params_dtype=torch.bfloat16, num_moe_experts=8,
    )
    assert cache_size.tokens_to_all_experts(config) == cache_size.ALL_EXPERTS_TOKENS
    config.num_moe_experts = 256
    row = 2 * (3 * 14336 + 2 * 4096)
    assert cache_size.tokens_to_all_experts(config) == 2 * 2**30 // (256 * row)
    config.expert_model_parallel_size = 2  # half of them on a rank
    assert cache_size.tokens_to_all_experts(config) == 2 * 2**30 // (128 * row)


def test_graphs_do_not_ask_ranks_with_experts_of_their_own_to_pad(sparse, monkeypatch):
    """Megatron's controller refuses them otherwise, and decoding would go on without graphs."""
    chunks, topology = sparse
    generator = MegatronGenerator(chunks, topology, max_sequence_length=16, vocab_size=128)
    generator.generate([np.arange(3, 8, dtype=np.int32)], replace(SAMPLED, max_new_tokens=2))
    made, config = generator.engine.controller, chunks[0].config
    monkeypatch.setattr(config, "cuda_graph_impl", "local")  # as while it is captured
    monkeypatch.setattr(config, "expert_model_parallel_size", 2)
    with pytest.raises(AssertionError, match="moe-pad-experts"):
        TextGenerationController(made.inference_wrapped_model, tokenizer=None)
    Controller(made.inference_wrapped_model, made._sampling)
    assert config.expert_model_parallel_size == 2, "as it was"
    generator.close()
