"""Stages that sample as replicas, on the whole model: the samples of one rank, its memory back.

Of the responses one may differ from one process's (``sampled``); stages and replicas may as well.
"""

import pytest

from megatron_irl.data.pair_bank import PairBank
from megatron_irl.policy.pipeline_sampling import missing
from tests.dist import pipeline_jobs
from tests.dist.layouts import LAYOUTS, SEED, VOCAB
from tests.dist.sampled import BUDGET, assert_same

SAMPLING = {"max_new_tokens": BUDGET, "eos_id": 1, "seed": SEED}


@pytest.fixture(scope="module")
def single(pool, tiny, prompts):
    known = {}

    def drawn(tied):
        if tied not in known:
            (found,) = pool.run(1, pipeline_jobs.over_rounds, hf=tiny[tied], layout={},
                                prompts=prompts, sampling=SAMPLING)
            known[tied] = found["drawn"]
        return known[tied]

    return drawn


@pytest.mark.parametrize(("name", "tied"), [
    ("pp2", False), ("pp2", True), ("pp2_vpp2", False), ("tp2_sp_pp2", True), ("pp2_dp2", False),
    ("pp4", True),
])
def test_replicas_sample_what_one_rank_does_round_by_round(
    pool, tiny, prompts, single, name, tied
):
    world_size, layout = LAYOUTS[name]
    ranks = pool.run(world_size, pipeline_jobs.over_rounds, hf=tiny[tied], layout=layout,
                     prompts=prompts, sampling=SAMPLING, ddp=None if tied else {})
    want = single(tied)
    assert want[0] != want[1] != want[2], "the weights of each round are others"
    tp = layout.get("tensor_model_parallel_size", 1)
    for rank, found in enumerate(ranks):
        assert found["replicas"] == 3 * [(rank // tp, world_size // tp, 1)]
        assert found["drawn"] == ranks[0]["drawn"], "every rank has all samples"
        assert found["random"], "building a model draws nothing"
        assert "samples by itself" in found["note"]
        for before, during, _ in found["held"]:
            assert during - before > found["copy"] > 0
        (_, _, first), _, (_, _, last) = found["held"]
        assert last - first < 20_000, "nothing stays of a round"
    for got, expected in zip(ranks[0]["drawn"], want, strict=True):
        assert_same(got, expected)


def test_own_layers_are_not_copied(pool, tiny, prompts):
    """With 4 layers of the same size, PP4 copies 3 of them and what of the ends it lacks."""
    _, layout = LAYOUTS["pp4"]
    ranks = pool.run(4, pipeline_jobs.over_rounds, hf=tiny[False], layout=layout,
                     prompts=prompts, sampling=SAMPLING, rounds=1)
    ends, norm = 4 * VOCAB * 64, 4 * 64
    copies = [found["copy"] for found in ranks]
    layer = (copies[0] - ends - norm) // 3
    assert copies == [3 * layer + ends + norm, 3 * layer + 2 * ends + norm,
                      3 * layer + 2 * ends + norm, 3 * layer + ends]


def test_stages_are_as_they_were(pool, tiny, prompts, single):
    world_size, layout = LAYOUTS["pp2"]
    ranks = pool.run(world_size, pipeline_jobs.over_rounds, hf=tiny[True], layout=layout,
                     prompts=prompts, sampling=SAMPLING, pipeline="stages")
    for found in ranks:
        assert found["replicas"] == 3 * [(0, 1, 2)]
        assert found["copy"] == 0 and found["note"] is None
    for got, expected in zip(ranks[0]["drawn"], single(True), strict=True):
        assert_same(got, expected)


def test_without_memory_the_stages_decode_in_turn(pool, tiny, prompts, single):
    """One rank's lack decides for all, and is measured anew in each phase."""
    world_size, layout = LAYOUTS["pp2"]
    ranks = pool.run(world_size, pipeline_jobs.under_scarcity, hf=tiny[False], layout=layout,
                     prompts=prompts, sampling=SAMPLING)
    want = [ids for ids, _, _ in single(False)[0]]

    def near(got):
        return sum(a == b for a, b in zip(got, want, strict=True)) >= len(want) - 1

    for rank, found in enumerate(ranks):
        drawn, note, replicas = found["scarce"]
        assert near(drawn) and replicas == 1
        assert "decode in turn, because the other stages' weights (" in note
        assert "more than is free" in note and "\n" not in note
        assert found["said once"] is None
        drawn, note = found["free again"]
        assert near(drawn) and "samples by itself" in note
        drawn, note = found["fails"]
        where = "on another rank" if rank == 0 else "not enough memory: you tried"
        assert near(drawn) and "could not be allocated" in note and where in note
        assert near(found["fails after a failure"])
        assert found["forced"].startswith("generation.pipeline=replicas cannot be: ")
        assert "Set it to auto or stages" in found["forced"]
        assert near(found["forced works"])


@pytest.mark.parametrize("ddp", [
    None, {"use_distributed_optimizer": True, "overlap_grad_reduce": True,
           "overlap_param_gather": True},
])
def test_every_stage_writes_parts_of_its_own(pool, tiny, prompts, single, tmp_path, ddp):
    world_size, layout = LAYOUTS["pp2_dp2"]
    ranks = pool.run(world_size, pipeline_jobs.fill_bank, hf=tiny[False], layout=layout,
                     prompts=prompts, sampling=SAMPLING, folder=str(tmp_path / "four"), ddp=ddp)
    (one,) = pool.run(1, pipeline_jobs.fill_bank, hf=tiny[False], layout={},
                      prompts=prompts, sampling=SAMPLING, folder=str(tmp_path / "one"))
    summary, _ = ranks[0]
    assert summary["replicas"] == 4 and "replicas" not in one[0]
    assert all(wrote for _, wrote in ranks), "no replica is idle"
    assert sorted(n for _, wrote in ranks for n in wrote) == list(range(5))

    def drawn(name):
        bank = PairBank(tmp_path / name)
        return [(p.sample_ids.tolist(), p.sample_logprobs, p.finish_reason)
                for p in bank.read_round(0)]

    assert_same(drawn("four"), drawn("one"))


def test_what_is_missing():
    """25 of weights, 30 of cache and a twentieth of 100 are 60."""
    assert missing(25, 30, free=60, total=100) == 0
    assert missing(25, 30, free=59, total=100) == 1
    assert missing(25, 30, free=55, total=0) == 0
