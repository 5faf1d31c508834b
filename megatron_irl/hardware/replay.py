"""Queued work recorded once and replayed: CUDA graphs of our own, beside Megatron's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Recorder:
    """Records functions that only queue kernels on tensors of fixed addresses.

    Recordings of one recorder share a pool of memory, so they are to be replayed one after the
    other, as they are in one stream.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what ``work`` queues, without running it; returns what replays it.

        Raises:
            RuntimeError: It waits for the device, or there is no CUDA.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the watchdog of NCCL and a checkpoint's threads use CUDA meanwhile,
        # which a capture of the whole process would take for errors.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


@contextmanager
def same_stream() -> Iterator[None]:
    """Keep the current stream through a block that sets another one for good."""
    stream = torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)
