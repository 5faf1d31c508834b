"""Seconds of work that the device does: by its own events on CUDA, by the clock on a CPU."""

import time
from types import TracebackType

import torch

from megatron_irl import hardware


class Stopwatch:
    """Seconds of a block, the device's queue emptied before and after.

    On CUDA between two events of the current stream, so that the host's waking up after the last
    wait is not counted.

    Attributes:
        seconds: Of the last block.

    Example:
        with Stopwatch() as watch:
            work()
        watch.seconds
    """

    seconds = 0.0

    def __init__(self) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * hardware.IS_CUDA)]
        self._start = 0.0

    def __enter__(self) -> "Stopwatch":
        hardware.synchronize()
        if self._events:
            self._events[0].record()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._events:
            self._events[1].record()
        hardware.synchronize()
        self.seconds = time.perf_counter() - self._start
        if self._events:
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3  # of milliseconds
