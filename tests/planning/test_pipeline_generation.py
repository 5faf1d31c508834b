"""How the stages of a planned pipeline generate, and what that takes."""

import dataclasses

import pytest

from megatron_irl.generation.cache_size import GIB
from megatron_irl.planning.machines import MACHINES
from megatron_irl.planning.plan import make_plan
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
    """A step takes as long, as the same weights are read for it, and there are four at a time.

    A little less: stages are taken to be as full as the fullest, and read the head. And 8 requests
    fill 8 places once, where a queue of 32 leaves a fifth of them empty.
    """
    stages, replicas = plan("stages").time, plan("replicas").time
    assert 0.8 * stages.decode_step < replicas.decode_step < stages.decode_step
    gain = replicas.decode_tokens_per_second / stages.decode_tokens_per_second
    assert STAGES * 0.85 < gain < STAGES / 0.8 / 0.8
    assert replicas.seconds["training"] == stages.seconds["training"]


@pytest.mark.parametrize(("memory", "replicas"), [(80, True), (34, False)])
def test_auto_takes_replicas_where_they_fit(memory, replicas):
    assert plan("auto", memory=memory).setup.replicas is replicas


def test_adapters_that_are_not_merged_are_sampled_in_turn():
    applied = {"rank": 8, "generation": "applied"}
    assert not plan("auto", adapter=applied).setup.replicas
    assert plan("auto", adapter=applied | {"generation": "merged"}).setup.replicas
