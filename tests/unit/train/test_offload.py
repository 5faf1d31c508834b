"""Optimizer state that was away while the policy generated is what it was, and training goes on."""

import copy

import pytest
import torch

from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.load import load_hf_weights
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.model.data_parallel import build_ddp_config, wrap_data_parallel
from megatron_irl.parallel.topology import initialize, shutdown
from megatron_irl.train.offload import _state_storages, offloaded
from megatron_irl.train.optimizer import build_megatron_optimizer
from tests.convert.tiny import make_tiny_llama

from megatron.core.optimizer import OptimizerConfig  # isort: skip


@pytest.fixture(params=["fp32", "bf16"])
def trained(request, tmp_path):
    """(chunks, optimizer) after one step on random gradients."""
    hf = make_tiny_llama(tmp_path / "hf", layers=1)
    topology = initialize(ParallelConfig())
    arch = architecture(read_hf_config(hf))
    config = build_config(arch, ParallelConfig(), precision=request.param)
    chunks = build_chunks(config, arch, topology)
    load_hf_weights(chunks, arch, hf, tp_rank=0, tp_size=1)
    chunks = wrap_data_parallel(chunks, config, topology, build_ddp_config())
    options = OptimizerConfig(
        lr=1e-2, params_dtype=config.params_dtype, bf16=request.param == "bf16",
        use_distributed_optimizer=True,
    )
    optimizer = build_megatron_optimizer(options, chunks, topology)
    step(chunks, optimizer, seed=0)
    yield chunks, optimizer
    shutdown()


def step(chunks, optimizer, *, seed):
    rng = torch.Generator().manual_seed(seed)
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for buffer in chunk.buffers:
            buffer.grad_data.copy_(torch.randn(buffer.grad_data.shape, generator=rng))
    optimizer.step()


def weights(chunks):
    return [p.detach().clone() for chunk in chunks for p in chunk.parameters()]


def test_training_goes_on_bit_for_bit(trained):
    chunks, optimizer = trained
    twin = copy.deepcopy([s.tolist() for s in _state_storages(chunks, optimizer)])
    places = [p.data_ptr() for chunk in chunks for p in chunk.parameters()]
    before = weights(chunks)
    assert twin, "there is state to move"
    with offloaded(chunks, optimizer):
        assert all(b.grad_data.untyped_storage().nbytes() == 0 for c in chunks for b in c.buffers)
        for mine, there in zip(weights(chunks), before, strict=True):
            assert torch.equal(mine, there), "the policy can generate meanwhile"
    assert [s.tolist() for s in _state_storages(chunks, optimizer)] == twin
    assert [p.data_ptr() for chunk in chunks for p in chunk.parameters()] == places
    step(chunks, optimizer, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(weights(chunks), before, strict=True))


def test_state_comes_back_after_an_error(trained):
    chunks, optimizer = trained
    twin = [s.tolist() for s in _state_storages(chunks, optimizer)]
    with pytest.raises(RuntimeError, match="planted"), offloaded(chunks, optimizer):
        raise RuntimeError("planted")
    assert [s.tolist() for s in _state_storages(chunks, optimizer)] == twin
