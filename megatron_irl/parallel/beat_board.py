"""What all ranks know of each other's signs of progress, through the process group's store.

A rank that waits for others gives no signs, however healthy they are: replicas end a round of
generation minutes apart. So before a rank takes silence for a hang, it looks whether any other got
on. Ranks in a deadlock all fall silent together, and a stopped process says nothing at all.
"""

import contextlib
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_irl.parallel.topology import Topology

_PATIENCE = timedelta(seconds=20)  # with a store that does not answer


class Heard(NamedTuple):
    """What the ranks have told, in seconds of ``time.time`` (machines agree on it within seconds,
    limits are minutes).

    Attributes:
        until: Until when the last of them may be without progress.
        oldest: When the one that spoke longest ago spoke.
    """

    until: float
    oldest: float


class BeatBoard:
    """Where ranks tell until when they may be without progress.

    Args:
        topology: Of the run; with one rank there is nobody to hear of.

    Collectives: none. For a thread of its own: a store whose rank was stopped may not answer.
    """

    def __init__(self, topology: Topology) -> None:
        self._rank, self._world_size = topology.rank, topology.world_size
        self._store: Any = None
        if topology.world_size > 1:
            # A client of its own, as another's may be waiting for a key, with its lock held.
            self._store = dist.distributed_c10d._get_default_store().clone()
            with contextlib.suppress(NotImplementedError, RuntimeError):
                self._store.set_timeout(_PATIENCE)

    def tell(self, until: float) -> None:
        """Publish this rank's; to be repeated, as a sign that the process runs."""
        if self._store is not None:
            self._store.set(f"beat/{self._rank}", f"{until!r} {time.time()!r}")

    def heard(self) -> Heard | None:
        """Of all ranks; None where there is one, or one has not spoken yet."""
        if self._store is None:
            return None
        keys = [f"beat/{rank}" for rank in range(self._world_size)]
        if not self._store.check(keys):  # what is missing would be waited for
            return None
        told = [tuple(map(float, value.split())) for value in self._store.multi_get(keys)]
        return Heard(max(until for until, _ in told), min(spoken for _, spoken in told))
