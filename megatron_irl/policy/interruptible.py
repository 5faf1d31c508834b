"""Ending a replica's generation between two parts of the bank, when the run is asked to stop."""

import contextlib
from collections.abc import Iterator, Mapping, Sized

from megatron_irl.parallel.agreement import ReplicaStop
from megatron_irl.parallel.stop_request import LEAVE_PART
from megatron_irl.parallel.topology import Topology


class _Left(Exception):
    """The replica leaves the rest of its queue for the next start."""


class Interruptible:
    """Ends a block of generation as soon as the parts that are begun are complete.

    Args:
        drawn: The samples there are, of every part that is not complete yet; kept up to date by
            the caller, in the same order on every rank of the replica.

    Example:
        queue = Interruptible(topology, drawn)
        with queue.may_end():
            generate(..., on_progress=lambda *_: queue.look())
    """

    def __init__(self, topology: Topology, drawn: Mapping[int, Sized]) -> None:
        self._stop, self._drawn, self._heart = ReplicaStop(topology), drawn, topology.heart
        self._awaited: set[int] | None = None

    def look(self) -> None:
        """Come by after a step of the engine. Collective over the ranks of the replica."""
        self._heart.beat()
        level = self._stop.level()
        if not level:
            return
        # What is begun when the request comes; parts that begin later are left where they are. The
        # samples so far are the same on every rank of the replica, and so is what is awaited.
        if self._awaited is None:
            self._awaited = {number for number, samples in self._drawn.items() if len(samples)}
        self._awaited &= self._drawn.keys()
        if level >= LEAVE_PART or not self._awaited:
            raise _Left

    @contextlib.contextmanager
    def may_end(self) -> Iterator[None]:
        """The block that ``look`` may end early."""
        with contextlib.suppress(_Left):
            yield
