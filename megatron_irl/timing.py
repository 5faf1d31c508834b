"""Where the time of a run goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_irl import hardware
from megatron_irl.parallel.heartbeat import Heartbeat


class Clock:
    """Seconds by phase, of the round in progress and of this process.

    Args:
        seconds: By phase of the round in progress; added to, and cleared by whoever closes a round.
        heart: Is told of every phase.

    Attributes:
        total: By phase since this process started.
    """

    def __init__(
        self, seconds: dict[str, float] | None = None, heart: Heartbeat | None = None
    ) -> None:
        self.seconds = {} if seconds is None else seconds
        self._heart = heart or Heartbeat()
        self.total: dict[str, float] = {}
        self._inner = 0.0
        self._started = time.perf_counter()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of a block to ``phase``; time of inner blocks is theirs."""
        outer, self._inner = self._inner, 0.0
        hardware.synchronize()  # a sync: queued kernels belong to the phase that queued them
        start = time.perf_counter()
        with self._heart.within(phase):
            yield
            hardware.synchronize()  # not on an error: then the time is nobody's
        elapsed = time.perf_counter() - start
        seconds = elapsed - self._inner
        self._inner = outer + elapsed
        for counted in (self.seconds, self.total):
            counted[phase] = counted.get(phase, 0.0) + seconds

    def share(self, phase: str) -> float:
        """Share of this process's time spent in ``phase``, in [0, 1]."""
        return self.total.get(phase, 0.0) / (time.perf_counter() - self._started)
