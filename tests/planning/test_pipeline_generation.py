"""How the stages of a planned pipeline generate, and what that takes."""

import dataclasses

import pytest

from megatron_irl.generation.cache_size import GIB
from megatron_irl.planning.layer_time import FP32_SHARE
from megatron_irl.planning.machines import MACHINES, Machine
from megatron_irl.planning.plan import make_plan
from megatron_irl.planning.workload import Lengths
from tests.planning.cases import irft, random_lengths, shape

STAGES = 4


def plan(pipeline, *, memory=80, **sections):
    """Llama 3.1 8B over four stages of one H100, or of a GPU with another memory in GiB."""
    recipe = irft(
        1, 8, parallel={"pipeline_model_parallel_size": STAGES, "data_parallel_size": 2},
        generation={"pipeline": pipeline, "max_requests": 8}, **sections,
    )
    machine = dataclasses.replace(MACHINES["h100"], memory=memory * GIB)
    return make_plan(recipe, shape("llama-3.1-8b"), machine, random_lengths(),
                     data_parallel_size=2)


def test_replicas_hold_the_model_once_and_a_cache_of_all_layers():
    stages, replicas = plan("stages"), plan("replicas")
    whole = sum(stage.terms["weights"] for stage in stages.stages)
    for in_turn, alone in zip(stages.stages, replicas.stages, strict=True):
        assert "other stages' weights" not in in_turn.terms
        assert alone.terms["weights"] + alone.terms["other stages' weights"] == whole
        assert alone.terms["KV cache"] == pytest.approx(STAGES * in_turn.terms["KV cache"])
        more = alone.phases["generation"] - in_turn.phases["generation"]
        assert more == pytest.approx(
            alone.terms["other stages' weights"] + (STAGES - 1) * in_turn.terms["KV cache"])
        assert {p: b for p, b in alone.phases.items() if p != "generation"} == {
            p: b for p, b in in_turn.phases.items() if p != "generation"}


def test_replicas_are_faster_by_what_stages_wait():
    """By 4 and, for stages that wait for the fullest one, at most 1.21 times that; worked by hand.

    A layer of it has 2 * 4096^2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 = 218.1 M weights, its head
    128,256 * 4096 = 525.3 M. The fullest of the stages in turn reads 8 layers and the head, 2.27 G;
    a replica 32 layers and the head, 7.50 G: a step of four stages takes at most 4 * 2.27 / 7.50 =
    1.21 times as long as one of a replica, and less the more of it is cache. Queues are long enough
    to fill places alike, and what replicas are sent is nothing beside a minute of sampling.
    """
    long = {"algorithm": {"name": "irft", "steps_per_round": 160}}
    stages, replicas = plan("stages", **long).time, plan("replicas", **long).time
    layer, head = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336, 128256 * 4096
    waiting = STAGES * (8 * layer + head) / (32 * layer + head)
    assert waiting == pytest.approx(1.21, abs=0.005)
    assert 1 < stages.decode_step / replicas.decode_step < waiting
    gain = replicas.decode_tokens_per_second / stages.decode_tokens_per_second
    assert 0.999 * STAGES < gain < waiting * STAGES
    assert replicas.seconds["training"] == stages.seconds["training"]


def test_the_measured_gain_of_replicas():
    """Two cores, as ``docs/scaling.md`` has it: 737 tokens/s in turn, 1334 as replicas.

    How fast a core multiplies is taken from the first figure; the second is planned. What a step
    costs the host beside its products is not in the plan, so that it is some percent high.
    """
    in_turn, replicas = 737.0, 1334.0
    rate = 50e9  # FLOP/s in fp32; any, to begin with
    for _ in range(3):
        rate *= in_turn / on_cores("stages", rate)
    assert on_cores("stages", rate) == pytest.approx(in_turn, rel=0.01)
    assert on_cores("replicas", rate) == pytest.approx(replicas, rel=0.15)


def on_cores(pipeline, rate):
    """Planned tokens/s of what ``tools/benchmark_pipeline.py`` samples by default."""
    arch = shape("llama-1.1b", hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
                 num_attention_heads=6, num_key_value_heads=6, vocab_size=8192)
    recipe = irft(
        1, 64, precision="fp32", parallel={"pipeline_model_parallel_size": 2},
        algorithm={"name": "irft", "steps_per_round": 1},
        generation={"pipeline": pipeline, "max_requests": 64},
    )
    core = Machine("core", 8 * GIB, rate / FP32_SHARE, 0.0, 10e9, 10e9, 10e9, per_node=2)
    lengths = Lengths.equal(64, 64, 64, "of the benchmark")
    return make_plan(recipe, arch, core, lengths,
                     data_parallel_size=1).time.decode_tokens_per_second


@pytest.mark.parametrize(("memory", "replicas"), [(80, True), (34, False)])
def test_auto_takes_replicas_where_they_fit(memory, replicas):
    assert plan("auto", memory=memory).setup.replicas is replicas


def test_adapters_that_are_not_merged_are_sampled_in_turn():
    applied = {"rank": 8, "generation": "applied"}
    assert not plan("auto", adapter=applied).setup.replicas
    assert plan("auto", adapter=applied | {"generation": "merged"}).setup.replicas
