"""Megatron's own modules of any rank of any layout, without memory, devices or other ranks.

Process groups are torch's fake ones, whose collectives return at once; tensors are fake ones, which
have shapes and no data. Seventy billion parameters on 512 ranks are built in a tenth of a second.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.config import ParallelConfig
from megatron_irl.parallel.topology import Topology, build_topology, shutdown

from megatron.core.tensor_parallel import get_cuda_rng_tracker  # isort: skip


@contextmanager
def fake_world(
    parallel: ParallelConfig, *, data_parallel_size: int = 1, tp_rank: int = 0, pp_rank: int = 0
) -> Iterator[Topology]:
    """A topology as a rank of the layout would see it; torch's own tensors stay real.

    In a process without a process group. Random states are put back afterwards.
    """
    assert not dist.is_initialized(), "this process belongs to a process group"
    assert not hardware.IS_CUDA, "plans are made on the CPU platform"
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    rng = torch.get_rng_state()
    # Megatron's order of ranks: tensor, then data, then pipeline.
    rank = tp_rank + tp * data_parallel_size * pp_rank
    dist.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=tp * data_parallel_size * pp
    )
    try:
        topology = build_topology(parallel)
        tracker: Any = get_cuda_rng_tracker()
        # Its fork compares random states, which fake tensors have none of.
        tracker.fork = lambda *_, **__: nullcontext()
        yield topology
    finally:
        shutdown()
        vars(get_cuda_rng_tracker()).pop("fork", None)
        torch.set_rng_state(rng)


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live.

    With real tensors and with fake ones. What stands in ``known`` was there before and is not
    counted, nor are views of it.

    Attributes:
        live: Bytes that are alive now.
        peak: Most of them at once since ``reset_peak``.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known = [t.untyped_storage() for t in known]  # held, so that no address comes again
        self._sizes |= {storage._cdata: 0 for storage in self._known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def reset_peak(self) -> None:
        """Count the peak anew, from what is alive."""
        self.peak = self.live

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def fake_tensors() -> FakeTensorMode:
    """Within it tensors are made without data; real ones may be used beside them."""
    return FakeTensorMode(allow_non_fake_inputs=True)
