"""Adam on the host, or in few bytes: the numbers of Adam on the device, in less of its memory."""

import numpy as np
import pytest
import torch

from tests.dist.jobs import make_pairs, objective
from tests.gpu.conftest import NEEDS_GPU, NEEDS_TRANSFORMER_ENGINE, VOCAB
from tests.gpu.models import FakeScheduler, build, policy_of

pytestmark = [pytest.mark.gpu, NEEDS_GPU, NEEDS_TRANSFORMER_ENGINE]
OFFLOAD = {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True,
           "overlap_cpu_optimizer_d2h_h2d": True}


def stepper_of(setup, options, *, fp32_grads=True):
    from megatron.core.optimizer import OptimizerConfig

    from megatron_irl.model.data_parallel import build_ddp_config
    from megatron_irl.train.optimizer import build_megatron_optimizer
    from megatron_irl.train.step import Stepper

    hf, topology = setup
    chunks, _ = build(hf, topology, precision="bf16")
    policy = policy_of(hf, chunks, topology).for_training(
        build_ddp_config({"grad_reduce_in_fp32": fp32_grads})
    )
    optimizer = build_megatron_optimizer(
        OptimizerConfig(lr=1e-3, bf16=True, params_dtype=torch.bfloat16, weight_decay=0.0,
                        use_distributed_optimizer=True, **options),
        policy.chunks, topology,
    )
    return Stepper(policy, optimizer)


def losses(stepper, steps):
    from megatron_irl.train.batches import microbatches_for

    batches = microbatches_for(
        make_pairs(3, 8, VOCAB), stepper.policy.topology, micro_batch_size=4,
        multiple_of=stepper.policy.multiple_of,
    )
    return [stepper.train_step(batches, objective).loss for _ in range(steps)]


def interrupted(setup, folder, options):
    """(ten losses, with a save after five; a fresh stepper that has read it)."""
    from megatron_irl.storage.checkpoint import Checkpointer

    stepper = stepper_of(setup, options)
    first = losses(stepper, 5)
    checkpointer = Checkpointer(folder, setup[1], keep=1)
    checkpointer.save(5, stepper.policy.chunks, stepper.optimizer, FakeScheduler(), {})
    whole = first + losses(stepper, 5)
    again = stepper_of(setup, options)
    checkpointer.load(5, again.policy.chunks, again.optimizer, FakeScheduler())
    return whole, again


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_host_steps_equal_device_steps(setup, tmp_path, fraction):
    """Ten steps; a checkpoint in between is read back and continued; forgetting the moments."""
    from megatron_irl.train.optimizer import reset_optimizer

    expected = losses(stepper_of(setup, {}), 10)
    options = OFFLOAD | {"optimizer_offload_fraction": fraction}
    whole, again = interrupted(setup, tmp_path, options)
    assert np.abs(np.array(whole) - expected).max() < 0.02 * expected[0]
    assert whole[-1] < whole[0]
    np.testing.assert_allclose(losses(again, 5), whole[5:], rtol=1e-3)
    reset_optimizer(again.optimizer)
    for part in getattr(again.optimizer, "chained_optimizers", [again.optimizer]):
        for inner in (part.optimizer, *part.optimizer.sub_optimizers):
            moments = [v for s in inner.state.values() for n, v in s.items() if "exp" in n]
            assert moments and not any(m.any() for m in moments)


def test_gradients_in_bf16(setup):
    expected = losses(stepper_of(setup, {}), 6)
    options = OFFLOAD | {"optimizer_offload_fraction": 1.0, "main_grads_dtype": torch.bfloat16}
    got = losses(stepper_of(setup, options, fp32_grads=False), 6)
    assert np.abs(np.array(got) - expected).max() < 0.05 * expected[0]


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16, torch.float16])
def test_few_bytes_resume(setup, tmp_path, moments):
    """Transformer Engine's Adam with 16 bits of each copy; a fresh one reads the checkpoint."""
    options = {"use_precision_aware_optimizer": True, "exp_avg_dtype": moments,
               "exp_avg_sq_dtype": moments, "adam_beta2": 0.95}
    expected = losses(stepper_of(setup, {"adam_beta2": 0.95}), 10)
    whole, again = interrupted(setup, tmp_path, options)
    assert np.abs(np.array(whole) - expected).max() < 0.02 * expected[0]
    # Moments in fp16 have a scale that is found anew; the others are the same bits.
    exact = {"rtol": 0, "atol": 0} if moments != torch.float16 else {"rtol": 1e-3}
    np.testing.assert_allclose(losses(again, 5), whole[5:], **exact)
