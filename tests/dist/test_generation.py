"""Megatron's engine on the training weights: transformers' tokens, the trainer's log-probabilities.

Tokens are compared exactly: of the sampled responses one may differ from one process's
(``sampled``), of the greedy ones, where two logits would have to lie that close, none.
"""

import numpy as np
import pytest
import torch

from tests.dist import jobs, memory
from tests.dist.layouts import LAYOUTS, SEED
from tests.dist.sampled import BUDGET, assert_same

NO_EOS = 10**6
NAMES = ("one", "tp2", "tp2_sp", "pp2", "pp2_vpp2", "tp2_pp2")
CASES = [(name, False) for name in NAMES]
CASES += [("one", True), ("pp2", True), ("tp2_pp2", True)]


@pytest.fixture(scope="module")
def expected(tiny, prompts):
    """By tied: (EOS id, greedy responses of transformers); the EOS id is one that occurs."""
    from transformers import AutoModelForCausalLM

    found = {}
    for tied, path in tiny.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

        def greedy(eos, model=model):
            ids = [torch.from_numpy(p)[None].long() for p in prompts]
            whole = [
                model.generate(i, attention_mask=torch.ones_like(i), max_new_tokens=BUDGET,
                               do_sample=False, eos_token_id=eos, pad_token_id=0)
                for i in ids
            ]
            return [w[0, i.shape[1] :].tolist() for w, i in zip(whole, ids, strict=True)]

        eos = greedy(NO_EOS)[2][BUDGET // 2]
        found[tied] = (eos, greedy(eos))
    return found


def same_on_every_rank(ranks):
    assert all(rank == ranks[0] for rank in ranks), "ranks report different samples"
    return ranks[0]


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_greedy_equals_transformers(pool, tiny, prompts, expected, name, tied):
    """In bursts, as on CUDA; the other tests look after every token, as on CPU."""
    world_size, layout = LAYOUTS[name]
    eos, want = expected[tied]
    got = same_on_every_rank(pool.run(
        world_size, jobs.generate, hf=tiny[tied], layout=layout, prompts=prompts,
        sampling={"temperature": 0.0, "max_new_tokens": BUDGET, "eos_id": eos}, burst_steps=5,
    ))
    assert [ids for ids, _, _ in got] == want, f"seed {SEED}"
    reasons = [reason for _, _, reason in got]
    assert reasons == ["stop" if ids[-1] == eos else "length" for ids in want]
    assert "stop" in reasons and len({tuple(ids) for ids in want}) > 3, f"seed {SEED}"


@pytest.fixture(scope="module")
def single(pool, tiny, prompts):
    """Samples of one process: by tied, in the form of ``jobs.generate``."""
    known = {}

    def samples(tied):
        if tied not in known:
            (known[tied],) = pool.run(
                1, jobs.generate, hf=tiny[tied], layout={}, prompts=prompts, sampling=sampling(tied)
            )
        return known[tied]

    return samples


def sampling(tied):
    """Plain sampling, and with filters where the embeddings are tied."""
    filters = {"temperature": 0.8, "top_p": 0.9, "top_k": 40} if tied else {}
    return {"max_new_tokens": BUDGET, "eos_id": 1, "seed": SEED} | filters


@pytest.mark.parametrize(("name", "tied"), [case for case in CASES if case[0] != "one"])
def test_samples_are_a_function_of_seed_and_key(pool, tiny, prompts, single, name, tied):
    world_size, layout = LAYOUTS[name]
    got = same_on_every_rank(pool.run(
        world_size, jobs.generate, hf=tiny[tied], layout=layout, prompts=prompts,
        sampling=sampling(tied),
    ))
    assert_same(got, single(tied))


def test_the_same_prompt_under_another_key_is_another_sample(pool, tiny, prompts, single):
    (twins,) = pool.run(
        1, jobs.generate, hf=tiny[False], layout={}, prompts=[prompts[0]] * 4,
        sampling=sampling(False),
    )
    assert twins[0][0] == single(False)[0][0]
    assert len({tuple(ids) for ids, _, _ in twins}) > 1, f"seed {SEED}"


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_engine_logprobs_equal_the_trainers(pool, tiny, prompts, name, tied):
    world_size, layout = LAYOUTS[name]
    engine, trainer = same_on_every_rank(pool.run(
        world_size, jobs.engine_and_trainer, hf=tiny[tied], layout=layout, prompts=prompts,
        sampling={"max_new_tokens": BUDGET, "eos_id": 1, "seed": SEED},
    ))
    assert len(engine) > 4 * len(prompts)
    np.testing.assert_allclose(engine, trainer, atol=1e-4, err_msg=f"seed {SEED}")
    assert np.std(trainer) > 0.3, "flat predictions would hide a wrong model"


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_a_capture_that_fails_on_one_rank_is_given_up_by_its_replica(pool, tiny, prompts, name):
    world_size, layout = LAYOUTS[name]
    ranks = pool.run(
        world_size, jobs.capture_fails_on_one, hf=tiny[False], layout=layout, prompts=prompts
    )
    for ids, graphs, warned in ranks:
        assert ids == ranks[0][0] and graphs == 0 and len(warned) == 1
    assert "failed: another rank" in ranks[0][2][0] and "failed: planted" in ranks[-1][2][0]


@pytest.mark.parametrize("name", ["one", "tp2", "pp2_vpp2"])
def test_cache_memory_is_released(pool, tiny, prompts, name):
    world_size, layout = LAYOUTS[name]
    for before, during, after, cache in pool.run(
        world_size, memory.memory_of_generation, hf=tiny[False], layout=layout, prompts=prompts
    ):
        assert during - before >= cache > 1_000_000
        assert after - before < 50_000  # index tensors of the last step stay
