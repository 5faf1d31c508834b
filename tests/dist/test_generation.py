"""Megatron's engine on the training weights: transformers' tokens, the trainer's log-probabilities.

Tokens are compared exactly. Layouts sum in different orders, so in fp32 a logit may differ by
about 1e-6; a greedy choice changes only where two logits lie that close, and a sampled one where
the uniform number falls that close to a step of the cumulative distribution. Of the sampled
responses one may therefore differ from one process's, of the greedy ones none.
"""

import numpy as np
import pytest
import torch

from tests.convert.tiny import make_tiny_llama
from tests.dist import jobs, memory

SEED = int(np.random.SeedSequence().entropy % 2**31)  # fresh inputs; printed with a failure
VOCAB, BUDGET, NO_EOS = 128, 10, 10**6
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2_vpp2": (
        2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    ),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
CASES = [(name, False) for name in LAYOUTS]
CASES += [("one", True), ("pp2", True), ("tp2_pp2", True)]
PROMPT_LENGTHS = (5, 1, 17, 9, 30, 2, 8, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("generation")
    return {
        tied: str(make_tiny_llama(root / f"tied_{tied}", tied=tied, seed=SEED, vocab=VOCAB))
        for tied in (False, True)
    }


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(SEED)
    return [rng.integers(2, VOCAB, n).astype(np.int32) for n in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def expected(folder, prompts):
    """By tied: (EOS id, greedy responses of transformers); the EOS id is one that occurs."""
    from transformers import AutoModelForCausalLM

    found = {}
    for tied, path in folder.items():
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
def test_greedy_equals_transformers(pool, folder, prompts, expected, name, tied):
    world_size, layout = LAYOUTS[name]
    eos, want = expected[tied]
    got = same_on_every_rank(pool.run(
        world_size, jobs.generate, hf=folder[tied], layout=layout, prompts=prompts,
        sampling={"temperature": 0.0, "max_new_tokens": BUDGET, "eos_id": eos},
    ))
    assert [ids for ids, _, _ in got] == want, f"seed {SEED}"
    reasons = [reason for _, _, reason in got]
    assert reasons == ["stop" if ids[-1] == eos else "length" for ids in want]
    assert "stop" in reasons and len({tuple(ids) for ids in want}) > 3, f"seed {SEED}"


@pytest.fixture(scope="module")
def single(pool, folder, prompts):
    """Samples of one process: by tied, in the form of ``jobs.generate``."""
    known = {}

    def samples(tied):
        if tied not in known:
            (known[tied],) = pool.run(
                1, jobs.generate, hf=folder[tied], layout={}, prompts=prompts, sampling=sampling(tied)
            )
        return known[tied]

    return samples


def sampling(tied):
    """Plain sampling, and with filters where the embeddings are tied."""
    filters = {"temperature": 0.8, "top_p": 0.9, "top_k": 40} if tied else {}
    return {"max_new_tokens": BUDGET, "eos_id": 1, "seed": SEED} | filters


@pytest.mark.parametrize(("name", "tied"), [case for case in CASES if case[0] != "one"])
def test_samples_are_a_function_of_seed_and_key(pool, folder, prompts, single, name, tied):
    world_size, layout = LAYOUTS[name]
    got = same_on_every_rank(pool.run(
        world_size, jobs.generate, hf=folder[tied], layout=layout, prompts=prompts,
        sampling=sampling(tied),
    ))
    want = single(tied)
    same = [(a, b) for a, b in zip(got, want, strict=True) if a[0] == b[0]]
    assert len(same) >= len(want) - 1, f"seed {SEED}"
    for (_, logprobs, reason), (_, expected_logprobs, expected_reason) in same:
        assert reason == expected_reason
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)


def test_the_same_prompt_under_another_key_is_another_sample(pool, folder, prompts, single):
    (twins,) = pool.run(
        1, jobs.generate, hf=folder[False], layout={}, prompts=[prompts[0]] * 4,
        sampling=sampling(False),
    )
    assert twins[0][0] == single(False)[0][0]
    assert len({tuple(ids) for ids, _, _ in twins}) > 1, f"seed {SEED}"


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_engine_logprobs_equal_the_trainers(pool, folder, prompts, name, tied):
    world_size, layout = LAYOUTS[name]
    engine, trainer = same_on_every_rank(pool.run(
        world_size, jobs.engine_and_trainer, hf=folder[tied], layout=layout, prompts=prompts,
        sampling={"max_new_tokens": BUDGET, "eos_id": 1, "seed": SEED},
    ))
    assert len(engine) > 4 * len(prompts)
    np.testing.assert_allclose(engine, trainer, atol=1e-4, err_msg=f"seed {SEED}")
    assert np.std(trainer) > 0.3, "flat predictions would hide a wrong model"


@pytest.mark.parametrize("name", ["one", "tp2", "pp2_vpp2"])
def test_cache_memory_is_released(pool, folder, prompts, name):
    world_size, layout = LAYOUTS[name]
    for before, during, after, cache in pool.run(
        world_size, memory.memory_of_generation, hf=folder[False], layout=layout, prompts=prompts
    ):
        assert during - before >= cache > 1_000_000
        assert after - before < 50_000  # index tensors of the last step stay
