"""Points where ranks agree on what only some of them know: that a run shall stop, or save."""

import contextlib
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_irl import hardware
from megatron_irl.errors import RunStopped
from megatron_irl.parallel.topology import Topology

_STOP_KEY = "megatron_irl/stop"
# Between two looks at what other replicas were asked. A look is a round trip to rank 0's store,
# which serves all replicas, and a step of the engine may take a few milliseconds.
_ASK_SECONDS = 1.0


def agree(numbers: Sequence[int], topology: Topology) -> list[int]:
    """The largest that any rank brings, of each number. Collective over every rank of the run."""
    return _largest(numbers, None) if topology.world_size > 1 else list(numbers)


def any_of_replica(flag: bool, topology: Topology) -> bool:
    """Whether any rank of this model replica says so. Collective over its ranks."""
    return bool(_largest([int(flag)], topology.groups.mp)[0])


def stop_if_asked(topology: Topology) -> None:
    """Stop here if any rank was asked to. Collective over every rank of the run.

    Raises:
        RunStopped: On every rank.
    """
    if agree([topology.stop.level], topology)[0]:
        stop(topology)


def stop(topology: Topology) -> None:
    """Stop this rank, as all others do that agreed on it.

    Raises:
        RunStopped: Always.
    """
    raise RunStopped(topology.stop.reason or "another rank was asked to")


class ReplicaStop:
    """Whether a replica that generates by itself shall stop; it meets the others only at the end.

    Ranks of one replica agree by a collective at every look. Replicas hear of each other through
    the store of the process group, about once a second.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._asked_at = time.monotonic()
        self._is_known = False  # by all replicas: this one told them, or was told

    def level(self) -> int:
        """See ``StopRequest.level``. Collective over tensor and pipeline parallelism."""
        topology = self.topology
        # One rank of a replica speaks with the others; its peers hear of it by the collective,
        # which all of them take part in at every look whatever they know: an ``if level`` around
        # it would leave those waiting that were not asked.
        speaks = topology.dp_size > 1 and topology.tp_rank == topology.pp_rank == 0
        if speaks and not topology.stop.level:
            self._listen()
        level = topology.stop.level
        if topology.tp_size * topology.pp_size > 1:
            level = _largest([level], topology.groups.mp)[0]
        if speaks and level:  # whichever rank of the replica was asked
            self._tell()
        return level

    def _listen(self) -> None:
        now = time.monotonic()
        if self._is_known or now - self._asked_at < _ASK_SECONDS:
            return
        self._asked_at = now
        with _lost_store():
            if dist.distributed_c10d._get_default_store().check([_STOP_KEY]):
                # Once: ``ask`` counts, and the same request heard twice would be a second one,
                # which gives up the part that is begun.
                self._is_known = True
                self.topology.stop.ask("another rank was asked to")

    def _tell(self) -> None:
        with _lost_store():
            if not self._is_known:
                dist.distributed_c10d._get_default_store().set(_STOP_KEY, "1")
                self._is_known = True


def _lost_store() -> contextlib.AbstractContextManager[object]:
    """A store that is gone is met by the next collective, with the error that it is."""
    return contextlib.suppress(dist.DistError)


def _largest(numbers: Sequence[int], group: object) -> list[int]:
    together = torch.tensor(list(numbers), dtype=torch.int64, device=hardware.device())
    dist.all_reduce(together, op=dist.ReduceOp.MAX, group=group)  # type: ignore[arg-type]
    # Waits for the device, and so for all that was queued before: after a step for its update.
    return together.tolist()
