"""The same pair bank gives the same training under every layout."""

import numpy as np
import pytest

from tests.dist import jobs, logprob_jobs
from tests.dist.layouts import LAYOUTS, SEED, SPLIT, VOCAB

NUM_PAIRS = 16
CASES = [(name, False) for name in SPLIT] + [("pp2", True), ("tp2_pp2", True)]
OPTIMIZERS = {
    # plain: no momentum, no clipping
    "sgd": {"optimizer": "sgd", "lr": 0.05, "sgd_momentum": 0.0, "clip_grad": 0.0},
    "adam": {"lr": 1e-3},
}


@pytest.fixture(scope="module")
def setting(pool, tiny, tmp_path_factory):
    """Folder and bank, by whether the embeddings are tied."""
    root = tmp_path_factory.mktemp("parity")
    made = {}
    for tied, hf in tiny.items():
        made[tied] = {"hf": hf, "folder": str(root / f"bank_{tied}")}
        pool.run(
            1, jobs.write_bank, **made[tied], seed=SEED, noise=3.0,
            pairs=jobs.make_pairs(SEED, NUM_PAIRS, VOCAB),
        )
    return made


@pytest.fixture(scope="module")
def single(pool, setting):
    """Trajectories on one process that computes a prompt for every response of it, each once."""
    known = {}

    def trajectory(tied, optimizer):
        if (tied, optimizer) not in known:
            (known[tied, optimizer],) = pool.run(
                1, jobs.train_on_bank, **setting[tied], layout={}, steps=5,
                optimizer=OPTIMIZERS[optimizer], share_prompts=False,
            )
        return np.array(known[tied, optimizer])

    return trajectory


@pytest.mark.parametrize(("name", "tied"), CASES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trajectory_equals_one_process(pool, setting, single, name, tied, optimizer):
    world_size, layout = LAYOUTS[name]
    ranks = pool.run(
        world_size, jobs.train_on_bank, **setting[tied], layout=layout, steps=5,
        optimizer=OPTIMIZERS[optimizer],
    )
    assert all(rank == ranks[0] for rank in ranks), "ranks report different numbers"
    got, expected = np.array(ranks[0]), single(tied, optimizer)
    assert expected[0, 0] != pytest.approx(expected[-1, 0], rel=1e-2), "nothing was learnt"
    difference = np.abs(got - expected) / expected
    assert difference[0].max() < 1e-5, f"seed {SEED}, first step: {difference[0]}"
    # Adam divides by the root of a squared gradient: near zero, rounding noise becomes a step.
    loss_bound, norm_bound = (1e-5, 1e-5) if optimizer == "sgd" else (3e-4, 5e-3)
    assert difference[:, 0].max() < loss_bound, f"seed {SEED}: {difference[:, 0]}"
    assert difference[:, 1].max() < norm_bound, f"seed {SEED}: {difference[:, 1]}"


@pytest.mark.parametrize(("world_size", "layout"), [
    (2, {}), (4, {"pipeline_model_parallel_size": 2}),
    (4, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
])
def test_overlapped_parameter_gather_changes_nothing(pool, setting, world_size, layout):
    """Buckets of a layer or less: the language-model head is gathered by itself."""
    def run(**ddp):
        return pool.run(
            world_size, jobs.steps_around_scoring, **setting[False], layout=layout, seed=SEED,
            vocab=VOCAB, optimizer=OPTIMIZERS["adam"], timeout=60, **ddp,
        )

    plain = run()
    overlapped = run(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=4096)
    assert all(rank == overlapped[0] for rank in overlapped), "ranks report different numbers"
    for got, expected in zip(overlapped[0][:2], plain[0][:2], strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4, err_msg=f"seed {SEED}")
    progress = plain[0][2]
    assert progress[0] == 1 and progress[1:] == sorted(progress[1:]) and progress[-1] == 24


@pytest.mark.parametrize("micro_batch_size", [1, 4, 16])
@pytest.mark.parametrize("rows_at_once", [5, 2048])
def test_splitting_the_batch_changes_nothing(pool, setting, single, micro_batch_size, rows_at_once):
    (got,) = pool.run(
        1, jobs.train_on_bank, **setting[False], layout={}, steps=1, optimizer=OPTIMIZERS["sgd"],
        micro_batch_size=micro_batch_size, rows_at_once=rows_at_once,
    )
    np.testing.assert_allclose(got[0], single(False, "sgd")[0], rtol=2e-6)


@pytest.mark.parametrize("name", ["one", "dp2", "pp2", "pp2_vpp2", "tp2_sp"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 90, 10_000])
def test_filling_microbatches_by_tokens_changes_nothing(
    pool, setting, single, name, micro_batch_tokens
):
    """A pair has 22 tokens at the mean and 70 at most: each alone, two or three, all together."""
    world_size, layout = LAYOUTS[name]
    ranks = pool.run(
        world_size, jobs.train_on_bank, **setting[False], layout=layout, steps=1,
        optimizer=OPTIMIZERS["sgd"], micro_batch_tokens=micro_batch_tokens,
    )
    assert all(rank == ranks[0] for rank in ranks), "ranks report different numbers"
    np.testing.assert_allclose(
        ranks[0][0], single(False, "sgd")[0], rtol=1e-5, err_msg=f"seed {SEED}"
    )


@pytest.mark.parametrize("model", [
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
], ids=["layers", "attention"])
def test_recomputed_attention_takes_back_its_own_rows(pool, setting, single, model):
    """A stage has begun with later microbatches when it computes the first one again."""
    world_size, layout = LAYOUTS["pp2"]
    for rank in pool.run(
        world_size, jobs.train_on_bank, **setting[False], layout=layout, steps=1,
        optimizer=OPTIMIZERS["sgd"], overrides=model,
    ):
        np.testing.assert_allclose(
            rank[0], single(False, "sgd")[0], rtol=1e-5, err_msg=f"seed {SEED}")


@pytest.mark.parametrize("name", ["one", "dp2", "pp2"])
def test_demonstrations_are_filled_by_tokens_too(pool, setting, name):
    options = {"hf": setting[False]["hf"], "seed": SEED, "vocab": VOCAB}
    (expected,) = pool.run(
        1, logprob_jobs.train_sft, layout={}, micro_batch_tokens=None, **options
    )
    world_size, layout = LAYOUTS[name]
    for rank in pool.run(
        world_size, logprob_jobs.train_sft, layout=layout, micro_batch_tokens=50, **options
    ):
        np.testing.assert_allclose(rank, expected, rtol=1e-5, err_msg=f"seed {SEED}")


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("name", ["one", "tp2"])
def test_fused_blocks_equal_eager_ones(pool, setting, name, softcap, with_mean):
    """What a GPU computes in one pass each way, against the softmax op by op."""
    world_size, layout = LAYOUTS[name]
    for rank in pool.run(
        world_size, logprob_jobs.both_blocks, hf=setting[False]["hf"], layout=layout, seed=SEED,
        block_size=5, softcap=softcap, with_mean=with_mean,
    ):
        for eager, fused in rank:
            np.testing.assert_allclose(fused, eager, rtol=2e-5, atol=2e-6, err_msg=f"seed {SEED}")


@pytest.mark.parametrize("name", ["one", *SPLIT])
@pytest.mark.parametrize("tied", [False, True])
def test_token_logprobs_equal_transformers(pool, setting, name, tied):
    import torch
    from transformers import AutoModelForCausalLM

    world_size, layout = LAYOUTS[name]
    hf = setting[tied]["hf"]
    ranks = pool.run(
        world_size, jobs.token_logprobs, hf=hf, layout=layout, seed=SEED, num=12, vocab=VOCAB
    )
    assert all(rank == ranks[0] for rank in ranks)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    everything = []
    for got, (prompt, response) in zip(
        ranks[0], jobs.random_sequences(SEED, 12, VOCAB), strict=True
    ):
        ids = torch.tensor(np.concatenate([prompt, response]))[None].long()
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)
        everything += got
    assert np.std(everything) > 0.3, "flat predictions would hide a wrong model"
