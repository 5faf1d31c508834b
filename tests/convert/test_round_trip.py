"""HF → Megatron → HF is bitwise the identity, under every layout, and the model is the same one."""

import filecmp
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert import jobs
from tests.convert.tiny import TEMPLATE, make_tiny_llama
from tests.dist import jobs as dist_jobs

SEED = 7411
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SPARSE = {
    "mixtral": {"family": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2,
                "sliding_window": None},
    "qwen3_moe": {"family": "qwen3_moe", "head_dim": 16, "num_experts": 8,
                  "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True},
}
MODELS = {
    "untied": {},
    "tied": {"tied": True},
    "mha": {"kv_heads": 8},
    "odd_vocab": {"vocab": 131},
    "mqa_odd_vocab": {"kv_heads": 1, "vocab": 131},
    "wide_heads": {"head_dim": 24},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}},
    "llama3_rope": {"rope_parameters": LLAMA3},
    "mistral": {"family": "mistral", "sliding_window": None, "head_dim": 8},
    "qwen2_tied": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "head_dim": 24},
    "llama_biases": {"attention_bias": True, "mlp_bias": True},
    "phi3": {"family": "phi3"},
    "gemma2": {"family": "gemma2", "head_dim": 16, "tied": True},
    "gemma3": {"family": "gemma3_text", "head_dim": 16, "tied": True},
    "gpt_neox": {"family": "gpt_neox", "scale": 0.25},
    "gpt_neox_tied_sequential": {
        "family": "gpt_neox", "tied": True, "use_parallel_residual": False,
        "hidden_act": "gelu_new",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0,
                            "partial_rotary_factor": 0.5},
    },
} | SPARSE
LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2_vpp2": (
        2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    ),
    "dp2": (2, {}),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2}),
}
SP = {"sequence_parallel": True}  # which experts need with tensor parallelism
SPARSE_LAYOUTS = {name: (ranks, sizes | SP) for name, (ranks, sizes) in LAYOUTS.items()
                  if "tensor_model_parallel_size" in sizes} | {
    "tp2_ep2": (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2} | SP),
}


def layout_of(name: str, layout: str) -> tuple[int, dict[str, int]]:
    """(ranks, sizes) of a layout for the model of that name."""
    return (LAYOUTS | SPARSE_LAYOUTS if name in SPARSE else LAYOUTS)[layout]


def options_of(name):
    """What a model is made with, for ``folder``."""
    return {"seed": SEED, **MODELS[name]}


def weights(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_weights(got: Path, expected: Path) -> None:
    one, other = weights(got), weights(expected)
    assert one.keys() == other.keys()
    assert [n for n in one if one[n].dtype != other[n].dtype] == []
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


@pytest.mark.parametrize("name", MODELS)
def test_one_process_is_bitwise(pool, folder, tmp_path, name):
    source, out = folder(name), tmp_path / "hf"
    pool.run(1, jobs.round_trip, hf=str(source), layout={}, out=str(out))
    assert_same_weights(out, source)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert filecmp.cmp(out / file, source / file, shallow=False)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in source.iterdir())
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["hf"], "no temporary folder is left"


@pytest.mark.parametrize(("name", "layout"), [
    *itertools.product(["tied", "odd_vocab", "qwen3", "phi3", "gpt_neox"], LAYOUTS),
    ("mixtral", "tp2_pp2"), ("qwen3_moe", "pp2_vpp2"), ("qwen3_moe", "tp2_ep2"),
])
def test_every_layout_is_bitwise(pool, folder, tmp_path, name, layout):
    world_size, sizes = layout_of(name, layout)
    source, out = folder(name), tmp_path / "hf"
    pool.run(
        world_size, jobs.round_trip, hf=str(source), layout=sizes, out=str(out),
        max_shard_bytes=60_000,
    )
    assert_same_weights(out, source)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {s.name for s in shards}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(out).values())


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("untied", "tied")])
def test_token_logprobs_equal_transformers(pool, folder, name):
    """Catches what a bitwise round trip cannot: a layout, norm or RoPE that is wrong both ways."""
    from transformers import AutoModelForCausalLM

    (result,) = pool.run(
        1, dist_jobs.token_logprobs, hf=str(folder(name)), layout={}, seed=SEED, num=5, vocab=128
    )
    model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32).eval()
    everything = []
    for got, (prompt, response) in zip(
        result, dist_jobs.random_sequences(SEED, 5, 128), strict=True
    ):
        ids = torch.tensor(np.concatenate([prompt, response]))[None].long()
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)
        everything += got
    assert np.std(everything) > 0.3, "flat predictions would hide a wrong model"


def test_sharded_source_and_bf16_export(pool, tmp_path):
    source = make_tiny_llama(tmp_path / "sharded", seed=SEED, max_shard_size="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 3
    out = tmp_path / "out" / "hf"  # the parent does not exist either
    pool.run(
        1, jobs.round_trip, hf=str(source), layout={}, out=str(out), dtype=torch.bfloat16,
        chat_template="{{ messages[0]['content'] }}",
    )
    expected, got = weights(source), weights(out)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n].bfloat16()) for n in got)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}" != TEMPLATE


def test_export_replaces_an_older_folder_and_leaves_it_on_a_full_disk(pool, folder, tmp_path):
    source, out = folder("untied"), tmp_path / "hf"
    out.mkdir()
    (out / "stale").write_text("from an earlier export")
    message = pool.run(1, jobs.full_disk, hf=str(source), out=str(out))[0]
    assert "cannot write" in message and str(out) in message
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert (out / "stale").exists(), "the older folder survives a failed export"
    pool.run(1, jobs.round_trip, hf=str(source), layout={}, out=str(out))
    assert not (out / "stale").exists()
    assert_same_weights(out, source)


def test_export_over_the_starting_model_is_refused(pool, folder):
    source = str(folder("untied"))
    with pytest.raises(RuntimeError, match="UserError.*starting model"):
        pool.run(1, jobs.round_trip, hf=source, layout={}, out=source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_not_finite_weights_are_named(pool, folder, tmp_path, name, value):
    source = folder("untied")
    tensors = weights(source)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (message,) = pool.run(1, jobs.load_message, hf=str(tmp_path), good=str(source))
    assert message.startswith("NaN or infinite weights")
    assert name in message and str(tmp_path / "model.safetensors") in message
    assert message.count("_proj") <= 1, "only the damaged tensor is named"


@pytest.mark.parametrize("equal", [True, False])
def test_head_of_a_tied_model(pool, folder, tmp_path, equal):
    """A redundant copy is ignored; another head would make the model ambiguous."""
    source = folder("tied")
    tensors = weights(source)
    head = tensors["model.embed_tokens.weight"].clone()
    head[5, 5] += 0.0 if equal else 1.0
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (message,) = pool.run(1, jobs.load_message, hf=str(tmp_path), good=str(source))
    if equal:
        assert message == "no error, unchanged=True"
    else:
        assert "lm_head.weight differs from model.embed_tokens.weight" in message
