"""What the GPU tests need, and ranks that share a GPU."""

import importlib.util

import pytest
import torch

from tests.convert.tiny import make_tiny_llama
from tests.dist.pool import Pool

VOCAB = 128


def _missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
NEEDS_TRANSFORMER_ENGINE = pytest.mark.skipif(
    _missing("transformer_engine"), reason="needs Transformer Engine, which is not installed"
)
NEEDS_FLASH_ATTENTION = pytest.mark.skipif(
    all(map(_missing, ("flash_attn", "flash_attn_interface", "flash_attn_4"))),
    reason="needs flash-attn, which is not installed",
)


class GpuPool(Pool):
    """Ranks over NCCL that share the first GPU.

    NCCL refuses two ranks on one device unless it takes them for two hosts, which then speak
    through the loopback interface: slow, but NCCL itself.
    """

    def environment_of(self, rank: int) -> dict[str, str]:
        """See ``Pool``."""
        return {"LOCAL_RANK": "0", "NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo",
                "NCCL_IB_DISABLE": "1", "MEGATRON_IRL_PLATFORM": ""}


@pytest.fixture(scope="session")
def gpu_pool():
    workers = GpuPool()
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tiny model whose sizes suit FP8 (multiples of 16), and a one-rank topology."""
    from megatron_irl.config import ParallelConfig
    from megatron_irl.parallel.topology import initialize, shutdown

    hf = make_tiny_llama(
        tmp_path_factory.mktemp("gpu") / "hf", hidden=256, intermediate=512, heads=4, kv_heads=2,
        layers=2, vocab=VOCAB, scale=0.1,
    )
    topology = initialize(ParallelConfig())
    yield hf, topology
    shutdown()
