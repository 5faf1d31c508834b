"""Model FLOPs against torch's own counter, and what a run says of its speed."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_irl.bench.generation import bytes_of_step
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.data.packing import pack
from megatron_irl.flops import (
    Tokens,
    experts_hit,
    forward_flops,
    layer_parameters,
    training_flops,
    unused_parameters,
)
from megatron_irl.planning.machines import MACHINES, machine_of_device
from megatron_irl.run.speed import Speedometer
from megatron_irl.train.batches import work_of
from tests.cli.conftest import data, model, small_recipe  # noqa: F401  (fixtures)
from tests.cli.harness import read_jsonl, run, write_recipe

TINY_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


def test_forward_flops_are_what_torch_counts(model):  # noqa: F811
    """Of transformers' forward over two sequences; torch counts attention without causality."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    arch = architecture(read_hf_config(model))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        for length in (17, 40):
            theirs(input_ids=torch.ones(1, length, dtype=torch.long))
    whole = Tokens.of([(0, 17), (0, 40)])
    hidden_half = 2.0 * arch.transformer["num_layers"] * arch.dims["q"] * whole.squares
    assert forward_flops(arch, whole) + hidden_half == counter.get_total_flops()


def test_forward_flops_of_a_mixture_are_those_of_the_experts_that_tokens_go_to():
    """Of transformers' Mixtral, whose experts multiply the rows of their own tokens alone."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, num_local_experts=8, num_experts_per_tok=3,
        architectures=["MixtralForCausalLM"], sliding_window=None,
    )
    theirs = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager")
    arch = architecture(config.to_dict())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        theirs(input_ids=torch.arange(40)[None])
    whole = Tokens.of([(0, 40)])
    hidden_half = 2.0 * 2 * arch.dims["q"] * whole.squares
    assert forward_flops(arch, whole) + hidden_half == counter.get_total_flops()
    # Of eight experts a token goes to three; without any for a router to choose from it is 8/3.
    assert unused_parameters(arch, 3) == 2 * 5 * 3 * 64 * 96
    dense = architecture(config.to_dict() | {"num_experts_per_tok": 8})
    more = 2 * 2 * 5 * 3 * 64 * 96 * 40
    assert forward_flops(dense, whole) - forward_flops(arch, whole) == more


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_experts_that_are_hit_are_counted_as_drawing_does(tokens):
    """The mean of 4000 draws, and at one token exactly as many as it goes to."""
    arch = SimpleNamespace(dims={"experts": 32}, transformer={"moe_router_topk": 4})
    rng = np.random.default_rng(tokens)
    drawn = rng.random((4000, tokens, 32)).argpartition(4, -1)[..., :4].reshape(4000, -1)
    mean = np.mean([len(np.unique(one)) for one in drawn])
    assert experts_hit(arch, tokens) == pytest.approx(mean, rel=0.01)
    assert experts_hit(arch, 1) == pytest.approx(4)
    assert experts_hit(SimpleNamespace(dims={"experts": 0}, transformer={}), 9) == 0


def test_generation_reads_the_experts_that_its_requests_hit(monkeypatch):
    """By hand: 2 requests, 8 experts, 2 a token: 8 * (1 - (3/4)^2) = 3.5 of them a layer."""
    monkeypatch.setattr("megatron_irl.run.speed.known_machine", lambda: MACHINES["h100"])
    arch = architecture(TINY_MIXTRAL)
    layer = 64 * (4 + 2 + 2 + 4) * 16 + 64 * 8
    weights = 2 * (layer + 3.5 * 3 * 64 * 96) + 64 * 128
    topology = SimpleNamespace(dp_size=1, tp_size=1, pp_size=1)
    speed = Speedometer(arch, topology, [torch.nn.Linear(2, 2)])
    found = speed.generation({"tokens_per_second": 2e6}, 2)["bandwidth_utilisation"]
    assert found == pytest.approx(2 * weights * 1e6 / MACHINES["h100"].bandwidth)
    read = bytes_of_step(arch, 100.0, 2, requests=2)
    assert read == 2 * (weights + 2 * 2 * 32 * 100)


def test_the_head_runs_on_response_rows_and_frozen_weights_have_no_gradient(model):  # noqa: F811
    arch = architecture(read_hf_config(model))
    few, many = Tokens.of([(30, 10)]), Tokens.of([(0, 40)])
    head = 6 * arch.dims["hidden"] * arch.vocab_size
    assert training_flops(arch, many) - training_flops(arch, few) == 30 * head
    assert training_flops(arch, few, head=False) == training_flops(arch, few) - 10 * head
    attention = 4 * arch.transformer["num_layers"] * arch.dims["q"] * 40**2 / 2
    forward = forward_flops(arch, few)
    assert training_flops(arch, few, adapter_parameters=100) == (
        2 * forward + attention + 6 * 100 * 40)
    assert Tokens.of([(3, 4), (1, 1)]).padded == Tokens(14, 98, 14, 2, 7)


def test_work_of_packs_leaves_padding_out():
    ids = np.arange(1, 6, dtype=np.int32)
    packs = [pack([(ids, ids[:3]), (ids[:2], ids[:1])], None, multiple_of=8),
             pack([(ids, ids)], None)]
    assert work_of(packs) == Tokens.of([(5, 3), (2, 1), (5, 5)])


def test_a_shared_prompt_is_computed_once_and_attended_to_by_each(model):  # noqa: F811
    """By hand: 5 + 3 + 1 tokens, attention over 8 and 6 of them."""
    ids = np.arange(1, 6, dtype=np.int32)
    work = work_of([pack([(ids, ids[:3]), (ids, ids[:1])], None, sharing=[2], multiple_of=8)])
    assert work == Tokens.of([(5, 3), (5, 1)], sharing=2) == Tokens(9, 64 + 36, 4, 2, 8, 5)
    assert work.whole == 14 and work.padded == Tokens(16, 128, 16, 2, 8)
    arch = architecture(read_hf_config(model))
    apart = training_flops(arch, Tokens.of([(5, 3), (5, 1)]))
    layers = arch.transformer["num_layers"]
    assert apart - training_flops(arch, work) == 6 * layers * layer_parameters(arch) * 5


@pytest.mark.parametrize(("name", "known"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
    ("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", None), ("", None),
])
def test_devices_are_known_by_the_drivers_names(name, known):
    machine = machine_of_device(name)
    assert (machine.name if machine else None) == known


def test_a_run_says_its_speed_and_records_a_step(model, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("megatron_irl.run.recorder.write_report", lambda folder: None)
    sections = small_recipe(model, data, tmp_path / "run")
    sections |= {"profile": {"steps": [2]}, "evaluation": {"interval": "never"}}
    sections["algorithm"] |= {"rounds": 1}
    result = run("train", write_recipe(tmp_path / "recipe.yaml", **sections))
    assert result.code == 0, result.err
    first, second = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    for line in (first, second):
        assert 0 < line["train/tflops"] < line["train/tflops_padded"]
        assert line["memory/peak_process"] > 0.1
        assert "train/mfu" not in line  # a CPU's peak is not known
    assert first["time/generation"] > 0 and first["time/reference"] > 0
    assert "time/generation" not in second
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "step_000002_rank_0.json"
    assert any("aten::mm" in e.get("name", "")
               for e in json.loads(trace.read_text())["traceEvents"])
