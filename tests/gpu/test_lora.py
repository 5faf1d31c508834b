"""Adapters on a GPU: Transformer Engine's fused norm-linears, FP8 below them, graphs.

``python tools/gpu_checks.py`` runs this folder and prints a table.
"""

import numpy as np
import pytest
import torch

from tests.dist.jobs import make_pairs, objective, random_sequences
from tests.gpu.conftest import NEEDS_FLASH_ATTENTION, NEEDS_GPU, NEEDS_TRANSFORMER_ENGINE, VOCAB
from tests.gpu.models import build

pytestmark = [pytest.mark.gpu, NEEDS_GPU]


def stepper_of(setup, precision, *, spec=None, lr=0.0, **overrides):
    """A stepper over adapters whose B is random, equal for every spec and precision."""
    from megatron.core.optimizer import OptimizerConfig

    from megatron_irl.adapters.adapters import add_adapters
    from megatron_irl.adapters.spec import adapter_spec
    from megatron_irl.config import AdapterConfig, ParallelConfig
    from megatron_irl.convert.hf_config import architecture, read_hf_config
    from megatron_irl.model.data_parallel import build_ddp_config
    from megatron_irl.policy.policy import Policy
    from megatron_irl.train.optimizer import build_megatron_optimizer
    from megatron_irl.train.step import Stepper

    hf, topology = setup
    arch = architecture(read_hf_config(hf))
    chunks, config = build(hf, topology, precision=precision, spec=spec, **overrides)
    wanted = AdapterConfig(rank=16, targets=("all-linear", "lm_head"))
    adapters = add_adapters(
        chunks, adapter_spec(wanted, arch, ParallelConfig(), seed=1), arch, topology
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in adapters.modules:
            module.lora_B.copy_(0.02 * torch.randn(module.lora_B.shape, generator=generator))
    policy = Policy(chunks, topology, arch, adapters=adapters).for_training(build_ddp_config())
    optimizer = build_megatron_optimizer(
        OptimizerConfig(lr=lr, bf16=config.bf16, params_dtype=config.params_dtype,
                        use_distributed_optimizer=True, clip_grad=0.0),
        policy.chunks, topology,
    )
    return Stepper(policy, optimizer)


def gradients(stepper):
    """Of every matrix after one step on fixed pairs, and the loss."""
    from megatron_irl.train.batches import microbatches_for

    policy = stepper.policy
    batches = microbatches_for(
        make_pairs(3, 8, VOCAB), policy.topology, micro_batch_size=4,
        multiple_of=policy.multiple_of,
    )
    loss = stepper.train_step(batches, objective).loss
    return loss, [p.main_grad.float().clone() for p in policy.adapters.parameters]


@pytest.mark.parametrize(("precision", "spec", "overrides", "bound"), [
    ("bf16", "local", {}, 0.05),
    pytest.param("bf16", "transformer_engine", {}, 0.05, marks=NEEDS_TRANSFORMER_ENGINE),
    pytest.param("bf16", "transformer_engine", {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
    }, 0.05, marks=NEEDS_TRANSFORMER_ENGINE),
    pytest.param("fp8", None, {}, 0.4, marks=NEEDS_TRANSFORMER_ENGINE),
])
def test_gradients_are_those_of_fp32(setup, precision, spec, overrides, bound):
    """Relative to fp32 in the local layers, whose own equal peft's (``tests/dist``)."""
    exact_loss, exact = gradients(stepper_of(setup, "fp32"))
    loss, got = gradients(stepper_of(setup, precision, spec=spec, **overrides))
    assert abs(loss - exact_loss) < 0.05
    for one, other in zip(got, exact, strict=True):
        assert (one - other).norm() < bound * other.norm()


@pytest.mark.parametrize("precision", [
    pytest.param("bf16", marks=[NEEDS_TRANSFORMER_ENGINE, NEEDS_FLASH_ATTENTION]), "fp32",
])
def test_merging_for_generation_is_undone_and_graphs_stay(setup, precision):
    """Samples under merged weights, a step, samples again by the same graphs; the base bitwise."""
    from megatron_irl.generation.interface import SamplingConfig

    stepper = stepper_of(setup, precision, lr=1e-3)
    policy = stepper.policy
    weights = [layer.weight for layer in policy.adapters.layers.values()]
    base, places = [w.clone() for w in weights], [w.data_ptr() for w in weights]
    prompts = [prompt for prompt, _ in random_sequences(8, 12, VOCAB)]
    sampling = SamplingConfig(max_new_tokens=24, eos_id=1)
    policy.open_generator(max_sequence_length=256, keep_cache="true")
    graphs = []
    for _ in range(2):
        samples = policy.generate(prompts, sampling)
        graphs.append(policy.generator.graph_count)
        assert all(map(torch.equal, base, weights)), "the base has changed"
        assert places == [w.data_ptr() for w in weights], "graphs would read elsewhere"
        pairs = [(p, s.token_ids) for p, s in zip(prompts, samples, strict=True)]
        engine = np.concatenate([s.logprobs for s in samples])
        difference = np.abs(engine - np.concatenate(policy.score(pairs)))
        assert difference.mean() < (0.02 if precision == "bf16" else 1e-4)
        gradients(stepper)
    assert graphs[0] == graphs[1]
    policy.generator.close()  # its graphs run no adapters
    policy.samples_merged = False
    applied = policy.generate(prompts, sampling)
    pairs = [(p, s.token_ids) for p, s in zip(prompts, applied, strict=True)]
    engine = np.concatenate([s.logprobs for s in applied])
    difference = np.abs(engine - np.concatenate(policy.score(pairs)))
    assert difference.mean() < (0.02 if precision == "bf16" else 1e-4)
    policy.generator.close()
