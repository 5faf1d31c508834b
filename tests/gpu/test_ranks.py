"""Several ranks over NCCL against one, on as few GPUs as there are: one is enough.

NCCL refuses two ranks on a device unless it takes them for two hosts; see ``gpu_pool``.
"""

import numpy as np
import pytest

from tests.convert.tiny import make_tiny_llama
from tests.gpu import jobs
from tests.gpu.conftest import NEEDS_FLASH_ATTENTION, NEEDS_GPU, NEEDS_TRANSFORMER_ENGINE

pytestmark = [pytest.mark.gpu, NEEDS_GPU]
SEED = int(np.random.SeedSequence().entropy % 2**31)  # fresh inputs; printed with a failure
LAYOUTS = {
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}
# precision → bounds on (log-probabilities at the mean, relative loss, relative gradient norm)
BOUNDS = {"fp32": (1e-5, 1e-5, 1e-5), "bf16": (0.02, 0.02, 0.05), "fp8": (0.15, 0.10, 0.20)}
PRECISIONS = ["fp32", pytest.param("bf16", marks=NEEDS_TRANSFORMER_ENGINE),
              pytest.param("fp8", marks=NEEDS_TRANSFORMER_ENGINE)]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Sizes that suit FP8 on two tensor-parallel ranks; heads of 64, which flash-attn takes."""
    return str(make_tiny_llama(
        tmp_path_factory.mktemp("ranks") / "hf", hidden=256, intermediate=512, heads=4, kv_heads=2,
        layers=2, vocab=128, scale=0.1, seed=SEED,
    ))


@pytest.fixture(scope="module")
def single(gpu_pool, hf):
    """What one rank gives that computes a prompt for each of its responses, by precision; once."""
    known = {}

    def result(precision):
        if precision not in known:
            (known[precision],) = gpu_pool.run(
                1, jobs.train, hf=hf, layout={}, precision=precision, seed=SEED,
                share_prompts=False,
            )
        return known[precision]

    return result


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_training_equals_one_rank(gpu_pool, hf, single, name, precision):
    ranks = gpu_pool.run(
        1 if name == "one" else 2, jobs.train, hf=hf, layout=LAYOUTS.get(name, {}),
        precision=precision, seed=SEED,
    )
    got, expected = ranks[0], single(precision)
    # Sums over a sequence's tokens are atomic additions on a GPU, whose order is nobody's.
    np.testing.assert_allclose(ranks[-1]["steps"], got["steps"], rtol=1e-6)
    mean, loss, norm = BOUNDS[precision]
    difference = np.abs(np.array(got["before"]) - expected["before"]).mean()
    assert difference < mean, f"seed {SEED}: {difference}"
    relative = np.abs(np.array(got["steps"]) / expected["steps"] - 1)
    assert relative[0, 0] < loss and relative[0, 1] < norm, f"seed {SEED}: {relative}"
    # Adam divides by the root of a squared gradient: near zero, rounding noise becomes a step.
    assert relative[:, 0].max() < max(20 * loss, 3e-4), f"seed {SEED}: {relative}"
    assert got["steps"][-1][0] < got["steps"][0][0], "nothing was learnt"
    assert np.std(expected["before"]) > 0.05, "flat predictions would hide a wrong model"


@pytest.mark.parametrize("name", LAYOUTS)
def test_generation_equals_one_rank(gpu_pool, hf, name):
    options = {"hf": hf, "precision": "fp32", "seed": SEED, "temperature": 0.0}
    (expected,) = gpu_pool.run(1, jobs.generate, layout={}, **options)
    ranks = gpu_pool.run(2, jobs.generate, layout=LAYOUTS[name], **options)
    for rank in ranks:
        # In fp32 a greedy choice changes only where two logits lie within rounding.
        same = sum(a == b for a, b in zip(rank["ids"], expected["ids"], strict=True))
        assert same >= len(expected["ids"]) - 1, f"seed {SEED}"
        np.testing.assert_allclose(rank["engine"], rank["trainer"], atol=1e-4)


@NEEDS_TRANSFORMER_ENGINE
@NEEDS_FLASH_ATTENTION
@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_engine_equals_trainer_in_bf16(gpu_pool, hf, name):
    """A queue of five times the places: one read of another's cache would be off by more."""
    for rank in gpu_pool.run(
        1 if name == "one" else 2, jobs.generate, hf=hf, layout=LAYOUTS.get(name, {}),
        precision="bf16", seed=SEED, temperature=1.0, count=40,
    ):
        difference = np.abs(np.array(rank["engine"]) - rank["trainer"])
        assert difference.mean() < 0.02 and difference.max() < 0.5, f"seed {SEED}"


@NEEDS_TRANSFORMER_ENGINE
@NEEDS_FLASH_ATTENTION
@pytest.mark.skipif(not jobs.has_graphs(), reason="this engine captures no CUDA graphs")
@pytest.mark.parametrize(("world_size", "layout"), [
    (1, {}), (2, {"tensor_model_parallel_size": 2}), (2, {"pipeline_model_parallel_size": 2}),
], ids=["one", "tp2", "pp2 as replicas"])
def test_graphs_change_no_sample(gpu_pool, hf, world_size, layout):
    """Three rounds; a graph reads weights by address, so it must see those of its round."""
    for captured, eager, graphs in gpu_pool.run(
        world_size, jobs.rounds_with_graphs, hf=hf, layout=layout, seed=SEED, timeout=200
    ):
        assert graphs > 0, "nothing was captured"
        assert captured == eager, f"seed {SEED}"
        assert captured[0] != captured[1], "the rounds sampled the same"
