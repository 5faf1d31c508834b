"""Models with experts on a GPU: Transformer Engine's grouped products, NCCL, the paged cache.

Every token goes to all experts but where it is said otherwise: which of two it goes to is decided
by rounding now and then, and no bound would hold.
"""

import numpy as np
import pytest

from tests.convert.tiny import make_tiny_llama
from tests.gpu import jobs
from tests.gpu.conftest import NEEDS_FLASH_ATTENTION, NEEDS_GPU, NEEDS_TRANSFORMER_ENGINE, VOCAB
from tests.gpu.models import build, logprobs
from tests.gpu.test_ranks import BOUNDS, PRECISIONS, SEED

pytestmark = [pytest.mark.gpu, NEEDS_GPU]
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "sliced": TP2, "whole": TP2 | {"expert_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2}, "dp2": {},
}


def sparse(folder, chosen=4):
    return str(make_tiny_llama(
        folder, family="qwen3_moe", hidden=256, heads=4, kv_heads=2, head_dim=64, layers=2,
        vocab=VOCAB, scale=0.1, seed=SEED, num_experts=4, num_experts_per_tok=chosen,
        moe_intermediate_size=256, norm_topk_prob=True,
    ))


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return sparse(tmp_path_factory.mktemp("experts") / "hf")


@NEEDS_TRANSFORMER_ENGINE
@pytest.mark.parametrize("grouped", [True, False])
def test_transformer_engine_spec_equals_local_spec(setup, hf, grouped):
    te, config = build(
        hf, setup[1], precision="bf16", spec="transformer_engine", moe_grouped_gemm=grouped
    )
    local, _ = build(hf, setup[1], precision="bf16", spec="local")
    assert config.moe_grouped_gemm == grouped
    difference = np.abs(logprobs(hf, te, setup[1]) - logprobs(hf, local, setup[1]))
    assert difference.mean() < 0.02 and difference.max() < 0.2


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_equals_one_rank(gpu_pool, hf, name, precision):
    setting = {"hf": hf, "precision": precision, "seed": SEED}
    (expected,) = gpu_pool.run(1, jobs.train, layout={}, **setting)
    got = gpu_pool.run(2, jobs.train, layout=LAYOUTS[name], **setting)[0]
    mean, loss, norm = BOUNDS[precision]
    difference = np.abs(np.array(got["before"]) - expected["before"]).mean()
    assert difference < mean, f"seed {SEED}"
    steps, of_one = np.array(got["steps"]), np.array(expected["steps"])
    np.testing.assert_allclose(steps[0, 0], of_one[0, 0], rtol=loss, err_msg=f"seed {SEED}")
    np.testing.assert_allclose(steps[0, 1], of_one[0, 1], rtol=norm, err_msg=f"seed {SEED}")


@NEEDS_TRANSFORMER_ENGINE
@NEEDS_FLASH_ATTENTION
@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_engine_equals_trainer(gpu_pool, tmp_path, name):
    """Two of four experts here: some tokens may be sent elsewhere, and the mean hardly moves."""
    ranks = gpu_pool.run(
        1 if name == "one" else 2, jobs.generate, hf=sparse(tmp_path / "hf", 2),
        layout=LAYOUTS.get(name, {}), precision="bf16", seed=SEED, temperature=1.0, vocab=VOCAB,
    )
    difference = np.abs(np.array(ranks[0]["engine"]) - ranks[0]["trainer"])
    assert difference.mean() < 0.03, f"seed {SEED}"


@NEEDS_TRANSFORMER_ENGINE
@NEEDS_FLASH_ATTENTION
@pytest.mark.skipif(not jobs.has_graphs(), reason="this engine captures no CUDA graphs")
@pytest.mark.parametrize("name", ["one", "sliced", "whole"])
def test_decoding_is_captured(gpu_pool, tmp_path, name):
    """Captured steps have more rows, so a token may be sent elsewhere; few samples notice."""
    for captured, eager, graphs in gpu_pool.run(
        1 if name == "one" else 2, jobs.rounds_with_graphs, hf=sparse(tmp_path / "hf", 2),
        layout=LAYOUTS.get(name, {}), seed=SEED, timeout=200,
    ):
        assert graphs > 0, "nothing was captured"
        same = [a == b for got, want in zip(captured, eager, strict=True)
                for a, b in zip(got, want, strict=True)]
        assert np.mean(same) > 0.8, f"seed {SEED}"
        assert captured[0] != captured[1], "the rounds sampled the same"
