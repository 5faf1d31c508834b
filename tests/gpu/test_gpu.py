"""What only a GPU can show on one rank. Skipped, with the reason, where something is missing.

``python tools/gpu_checks.py`` runs this folder and prints a table.
"""

import numpy as np
import pytest
import torch

from tests.convert.tiny import make_tiny_llama
from tests.dist.jobs import make_pairs, objective, random_sequences
from tests.gpu.conftest import NEEDS_FLASH_ATTENTION, NEEDS_GPU, NEEDS_TRANSFORMER_ENGINE, VOCAB
from tests.gpu.models import FakeScheduler, build, logprobs, policy_of, tensors_of

pytestmark = [pytest.mark.gpu, NEEDS_GPU]


@NEEDS_TRANSFORMER_ENGINE
def test_transformer_engine_spec_equals_local_spec(setup):
    hf, topology = setup
    te, _ = build(hf, topology, precision="bf16", spec="transformer_engine")
    local, _ = build(hf, topology, precision="bf16", spec="local")
    difference = np.abs(logprobs(hf, te, topology) - logprobs(hf, local, topology))
    assert difference.mean() < 0.02 and difference.max() < 0.2


@NEEDS_TRANSFORMER_ENGINE
@pytest.mark.parametrize(
    "model", [{"family": "gpt_neox"}, {"family": "mistral", "sliding_window": 8}]
)
def test_specs_are_equal_for_other_families(setup, tmp_path, model):
    """The parallel residual over fused norms, and windows in Transformer Engine's attention."""
    hf = make_tiny_llama(
        tmp_path / "hf", hidden=256, intermediate=512, heads=4, kv_heads=2, layers=2, vocab=VOCAB,
        scale=0.1, **model,
    )
    te, _ = build(hf, setup[1], precision="bf16", spec="transformer_engine")
    local, _ = build(hf, setup[1], precision="bf16", spec="local")
    difference = np.abs(logprobs(hf, te, setup[1]) - logprobs(hf, local, setup[1]))
    assert difference.mean() < 0.02 and difference.max() < 0.2


@NEEDS_TRANSFORMER_ENGINE
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_logprobs_stay_near_bf16(setup, recipe):
    major, _ = torch.cuda.get_device_capability()
    if recipe == "mxfp8" and major < 10:
        pytest.skip("mxfp8 needs a Blackwell GPU")
    if recipe == "blockwise" and major != 9:
        pytest.skip("blockwise scaling needs a Hopper GPU")

    hf, topology = setup
    bf16, _ = build(hf, topology, precision="bf16")
    fp8, config = build(hf, topology, precision="fp8", fp8_recipe=recipe)
    assert config.fp8 == "hybrid"
    difference = np.abs(
        logprobs(hf, fp8, topology) - logprobs(hf, bf16, topology)
    )
    assert 0 < difference.mean() < 0.15, f"{recipe}: mean {difference.mean()}"


def test_fp32_is_not_tf32(setup):
    """Products rounded to TF32 differ from the CPU's by some 1e-3."""
    (chunk,), _ = build(setup[0], setup[1], precision="fp32")
    weight = chunk.decoder.layers[0].mlp.linear_fc1.weight.detach()
    exact = weight.cpu().double() @ weight.cpu().double().t()
    assert ((weight @ weight.t()).cpu() - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("precision", "head_size"), [
    pytest.param("bf16", 64, marks=[NEEDS_TRANSFORMER_ENGINE, NEEDS_FLASH_ATTENTION]),
    pytest.param("bf16", 128, marks=[NEEDS_TRANSFORMER_ENGINE, NEEDS_FLASH_ATTENTION]),
    ("fp32", 64),
])
def test_engine_equals_trainer(setup, tmp_path, precision, head_size):
    from megatron_irl.generation.interface import SamplingConfig
    from megatron_irl.generation.megatron_engine import MegatronGenerator

    topology = setup[1]
    hf = make_tiny_llama(
        tmp_path / "hf", hidden=256, intermediate=512, heads=256 // head_size, kv_heads=2, layers=2,
        vocab=VOCAB, scale=0.1,
    )
    chunks, _ = build(hf, topology, precision=precision)
    prompts = [prompt for prompt, _ in random_sequences(8, 12, VOCAB)]
    with MegatronGenerator(
        chunks, topology, max_sequence_length=256, vocab_size=VOCAB
    ) as generator:
        samples = generator.generate(prompts, SamplingConfig(max_new_tokens=24, eos_id=1))
    pairs = [(p, s.token_ids) for p, s in zip(prompts, samples, strict=True)]
    trainer = np.concatenate(policy_of(hf, chunks, topology).score(pairs))
    engine = np.concatenate([s.logprobs for s in samples])
    assert np.abs(engine - trainer).mean() < (0.02 if precision == "bf16" else 1e-4)


@NEEDS_TRANSFORMER_ENGINE
def test_generation_leaves_fp8_as_it_was(setup):
    """Samples are drawn in bf16, and the model computes in FP8 again afterwards."""
    from megatron_irl.generation.interface import SamplingConfig
    from megatron_irl.generation.megatron_engine import MegatronGenerator

    chunks, config = build(setup[0], setup[1], precision="fp8")
    before = logprobs(setup[0], chunks, setup[1])
    with MegatronGenerator(
        chunks, setup[1], max_sequence_length=256, vocab_size=VOCAB
    ) as generator:
        generator.generate([np.arange(3, 9)], SamplingConfig(max_new_tokens=24, eos_id=1))
    assert config.fp8 == "hybrid"
    np.testing.assert_array_equal(logprobs(setup[0], chunks, setup[1]), before)


@NEEDS_TRANSFORMER_ENGINE
@NEEDS_FLASH_ATTENTION
def test_it_says_what_it_runs_on_and_that_is_fast(setup):
    from megatron_irl.model.kernels import describe_kernels

    (chunk,), _ = build(setup[0], setup[1], precision="bf16")
    kernels = describe_kernels(chunk, layers="transformer_engine", not_captured=None)
    assert kernels.training_attention in ("fused (cuDNN)", "flash-attn"), kernels.line()
    assert kernels.generation_attention.startswith("flash-attn")
    assert kernels.warnings() == [] and {"cuDNN", "NCCL"} <= set(kernels.versions)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_blocks_equal_eager_ones(setup, dtype, softcap):
    """Log-probabilities and their gradient in one pass each way, against op by op."""
    from megatron_irl.parallel.vocabulary_block import EagerBlock, FusedBlock

    group = setup[1].tp_group
    for rows in (1, 37, 300):
        hidden = torch.randn(rows, 64, device="cuda", dtype=dtype)
        weight = torch.randn(1000, 64, device="cuda", dtype=dtype)
        targets = torch.randint(-20, 1020, (rows,), device="cuda")  # some of another slice
        grad = torch.randn(rows, device="cuda")
        eager, fused = (
            make(hidden, weight, targets, 0, group, softcap, keep=True)
            for make in (EagerBlock, FusedBlock)
        )
        inside = (targets >= 0) & (targets < 1000)
        torch.testing.assert_close(
            fused.logprobs_R[inside], eager.logprobs_R[inside], rtol=1e-5, atol=1e-4
        )
        torch.testing.assert_close(fused.gradient(grad), eager.gradient(grad))
        eager, fused = (
            make(hidden, weight, targets, 0, group, softcap, keep=True, with_mean=True)
            for make in (EagerBlock, FusedBlock)
        )
        torch.testing.assert_close(fused.mean_R, eager.mean_R, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(fused.gradient(grad, -2 * grad), eager.gradient(grad, -2 * grad))


@NEEDS_TRANSFORMER_ENGINE
def test_lean_layers_equal_plain_ones(setup):
    """SwiGLU by Transformer Engine's kernels, values and gradient, against float64."""
    from megatron_irl.model.lean_layers import SwiGLU

    x = torch.randn(33, 1, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = SwiGLU(None)(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    exact = x.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    expected.backward(grad.double())
    assert out.shape == (33, 1, 64)
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("precision", [
    "fp32", "bf16", pytest.param("fp8", marks=NEEDS_TRANSFORMER_ENGINE)
])
def test_training_lowers_the_loss_and_its_checkpoint_loads(setup, precision, tmp_path):
    from megatron.core.optimizer import OptimizerConfig

    from megatron_irl.model.data_parallel import build_ddp_config
    from megatron_irl.storage.checkpoint import Checkpointer
    from megatron_irl.train.batches import microbatches_for
    from megatron_irl.train.optimizer import build_megatron_optimizer
    from megatron_irl.train.step import Stepper

    hf, topology = setup
    chunks, config = build(hf, topology, precision=precision)
    policy = policy_of(hf, chunks, topology).for_training(build_ddp_config())
    wrapped = policy.chunks
    optimizer = build_megatron_optimizer(
        OptimizerConfig(
            lr=1e-3, bf16=config.bf16, params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
        ),
        wrapped, topology,
    )
    stepper = Stepper(policy, optimizer)
    batches = microbatches_for(
        make_pairs(3, 8, VOCAB), topology, micro_batch_size=4, multiple_of=policy.multiple_of
    )
    losses = [stepper.train_step(batches, objective).loss for _ in range(8)]
    assert losses[-1] < losses[0]
    checkpointer = Checkpointer(tmp_path, topology, keep=1)
    sharded = checkpointer._sharded(wrapped, optimizer, is_loading=False)
    state = [t for t in tensors_of(sharded["optimizer"]) if t.numel() > 1]
    assert state and all(t.device.type == "cpu" for t in state), "gathered in host memory"
    before = logprobs(hf, wrapped, topology)
    checkpointer.save(8, wrapped, optimizer, FakeScheduler(), {})
    with torch.no_grad():
        for parameter in wrapped[0].parameters():
            parameter.zero_()
    checkpointer.load(8, wrapped, optimizer, FakeScheduler())
    np.testing.assert_array_equal(logprobs(hf, wrapped, topology), before)
