"""Groups on a pretended GPU: none of gloo beside NCCL's, all in time limits."""

import datetime

import pytest
import torch
import torch.distributed as dist

from megatron_irl import hardware
from megatron_irl.compat import narrow_optimizer
from megatron_irl.compat.adam_state import loadable
from megatron_irl.compat.optimizer_blocks import in_blocks
from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.hardware.narrow_adam import NarrowAdam
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.model.data_parallel import build_ddp_config, wrap_data_parallel
from megatron_irl.parallel.topology import build_topology, initialize, shutdown
from megatron_irl.storage.checkpoint import Checkpointer
from megatron_irl.train.optimizer import build_megatron_optimizer
from tests.convert.tiny import make_tiny_llama

from megatron.core.dist_checkpointing.dict_utils import nested_values  # isort: skip
from megatron.core import parallel_state, tensor_parallel  # isort: skip
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # isort: skip


@pytest.fixture
def joined():
    yield initialize(ParallelConfig())
    shutdown()


@pytest.fixture
def topology_on_cuda(joined, monkeypatch):
    """The topology as built on a GPU; random states that graphs can hold need a real one."""
    seed = tensor_parallel.model_parallel_cuda_manual_seed

    def seed_without_graphs(*args, use_cudagraphable_rng, **options):
        assert use_cudagraphable_rng
        seed(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_parallel, "model_parallel_cuda_manual_seed", seed_without_graphs)
        patch.setattr(hardware, "IS_CUDA", True)
        return build_topology(ParallelConfig())


def test_no_group_is_made_that_nobody_uses(topology_on_cuda):
    """Megatron makes a second set over gloo unless told otherwise, for gathering optimizers."""
    assert topology_on_cuda.dp_group.size() == dist.get_world_size()
    with pytest.raises(AssertionError, match="gloo"):
        parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)


@pytest.mark.parametrize("moments", [None, torch.float32, torch.bfloat16],
                         ids=["Adam", "few bytes", "fewer bytes"])
def test_an_optimizer_is_saved_without_gathering_or_a_copy(
    topology_on_cuda, monkeypatch, tmp_path, moments
):
    """What is planned for a checkpoint are views of what this rank updates, moments and weights."""
    hf = make_tiny_llama(tmp_path / "hf", layers=1)
    topology = topology_on_cuda
    arch = architecture(read_hf_config(hf))
    config = build_config(arch, ParallelConfig(), precision="bf16" if moments else "fp32")
    chunks = wrap_data_parallel(
        build_chunks(config, arch, topology), config, topology, build_ddp_config()
    )
    few = {"bf16": True, "use_precision_aware_optimizer": True, "exp_avg_dtype": moments,
           "exp_avg_sq_dtype": moments}
    options = narrow_optimizer.config_of({
        "lr": 1e-3, "params_dtype": config.params_dtype, "use_distributed_optimizer": True,
    } | (few if moments else {}))
    monkeypatch.setattr(hardware, "BACKEND", "nccl")
    optimizer = build_megatron_optimizer(options, chunks, topology)
    optimizer.step()  # Megatron's state begins with it
    monkeypatch.setattr(DistributedOptimizer, "get_parameter_state_dp_zero", None)  # it gathers
    for name in ("state_dict", "load_state_dict"):  # Transformer Engine's copy every state
        monkeypatch.setattr(NarrowAdam, name, None, raising=False)
    checkpointer = Checkpointer(tmp_path / "checkpoints", topology, keep=1)
    (inner,) = optimizer.chained_optimizers
    owned = {
        tensor.untyped_storage().data_ptr() for state in inner.optimizer.state.values()
        for name, tensor in state.items() if name != "step"
    } | {buffer.param_data.untyped_storage().data_ptr() for buffer in inner.buffers}
    for is_loading in (False, True):
        with loadable(optimizer), in_blocks(optimizer):
            sharded = checkpointer._sharded(chunks, optimizer, is_loading=is_loading)
        listed = list(nested_values(sharded["optimizer"]["param_state"]))
        assert listed and all(t.data.untyped_storage().data_ptr() in owned for t in listed)


def test_every_group_has_the_time_limit(monkeypatch):
    """Megatron's own default is half an hour, less than a rank may have to wait for another."""
    asked = []
    original = parallel_state.create_group

    def spy(*args, timeout=None, **options):
        asked.append(timeout)
        return original(*args, timeout=timeout, **options)

    monkeypatch.setattr(parallel_state, "create_group", spy)
    try:
        initialize(ParallelConfig(timeout_minutes=77))
    finally:
        shutdown()
    assert set(asked) == {datetime.timedelta(minutes=77)}
