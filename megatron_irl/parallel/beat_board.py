"""What all ranks know of each other's signs of progress, through the process group's store.

A rank that waits for others gives no signs, however healthy they are: replicas end a round of
generation minutes apart. So before a rank takes silence for a hang, it looks whether any other got
on. Ranks in a deadlock, or behind one that was stopped, all fall silent together.
"""

import contextlib
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_irl.parallel.topology import Topology

_PATIENCE = timedelta(seconds=20)  # with a store that does not answer


class BeatBoard:
    """Until when each rank may be silent, in seconds of ``time.time`` (machines agree on it within
    seconds, limits are minutes).

    Args:
        topology: Of the run; with one rank there is nobody to hear of.

    Collectives: none. For a thread of its own: a store whose rank was stopped may not answer.
    """

    def __init__(self, topology: Topology) -> None:
        self._rank, self._world_size = topology.rank, topology.world_size
        self._told = 0.0
        self._store: Any = None
        if topology.world_size > 1:
            # A client of its own, as another's may be waiting for a key, with its lock held.
            self._store = dist.distributed_c10d._get_default_store().clone()
            with contextlib.suppress(NotImplementedError, RuntimeError):
                self._store.set_timeout(_PATIENCE)

    def tell(self, until: float) -> None:
        """Publish this rank's, if it has changed."""
        if self._store is not None and until != self._told:
            self._store.set(f"beat/{self._rank}", repr(until))
            self._told = until

    def latest(self) -> float:
        """The latest of all ranks; 0 where none has told."""
        if self._store is None:
            return 0.0
        keys = [f"beat/{rank}" for rank in range(self._world_size)]
        # A key that is missing would be waited for; every rank tells before anybody can be late.
        if not self._store.check(keys):
            return time.time()
        return max(float(value) for value in self._store.multi_get(keys))
