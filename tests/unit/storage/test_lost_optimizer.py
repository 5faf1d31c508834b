"""A checkpoint without the optimizer's state is refused: zero moments would not show."""

from types import SimpleNamespace

import pytest
import torch

from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.errors import UserError
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.model.data_parallel import build_ddp_config, wrap_data_parallel
from megatron_irl.parallel.topology import initialize, shutdown
from megatron_irl.storage.checkpoint import Checkpointer
from megatron_irl.train.optimizer import build_megatron_optimizer
from tests.convert.tiny import make_tiny_llama

from megatron.core.optimizer import OptimizerConfig  # isort: skip

SCHEDULE = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)


@pytest.fixture
def topology():
    yield initialize(ParallelConfig())
    shutdown()


def test_a_checkpoint_without_the_optimizer_is_refused(topology, tmp_path):
    arch = architecture(read_hf_config(make_tiny_llama(tmp_path / "hf", layers=1)))
    config = build_config(arch, ParallelConfig())
    chunks = wrap_data_parallel(
        build_chunks(config, arch, topology), config, topology, build_ddp_config()
    )
    options = OptimizerConfig(lr=1e-3, params_dtype=torch.float32, use_distributed_optimizer=True)
    optimizer = build_megatron_optimizer(options, chunks, topology)
    checkpointer = Checkpointer(tmp_path / "checkpoints", topology, keep=1)
    checkpointer.save(1, chunks, None, SCHEDULE, {"round": 4})
    with pytest.raises(UserError, match="optimizer"):
        checkpointer.load(1, chunks, optimizer, SCHEDULE)
    assert checkpointer.load(1, chunks) == {"round": 4}
    checkpointer.save(2, chunks, optimizer, SCHEDULE, {"round": 5})
    assert checkpointer.load(2, chunks, optimizer, SCHEDULE) == {"round": 5}
