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
_ASK_SECONDS = 1.0  # between two looks at what other replicas were asked


def agree(numbers: Sequence[int], topology: Topology) -> list[int]:
    """The largest that any rank brings, of each number. Collective over every rank of the run."""
    return _largest(numbers, None) if topology.world_size > 1 else list(numbers)


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
        self._is_told = False

    def level(self) -> int:
        """See ``StopRequest.level``. Collective over tensor and pipeline parallelism."""
        topology = self.topology
        level = topology.stop.level
        if topology.dp_size > 1 and topology.tp_rank == topology.pp_rank == 0:
            level = max(level, self._of_others(level))
        if topology.tp_size * topology.pp_size > 1:
            level = _largest([level], topology.groups.mp)[0]
        return level

    def _of_others(self, level: int) -> int:
        now = time.monotonic()
        tell = level > 0 and not self._is_told
        if not tell and now - self._asked_at < _ASK_SECONDS:
            return 0
        self._asked_at = now
        store = dist.distributed_c10d._get_default_store()
        with contextlib.suppress(dist.DistError):  # a lost store is met by the next collective
            if tell:
                store.set(_STOP_KEY, "1")
                self._is_told = True
            elif store.check([_STOP_KEY]):
                self._is_told = True
                self.topology.stop.ask("another rank was asked to")
        return self.topology.stop.level


def _largest(numbers: Sequence[int], group: object) -> list[int]:
    together = torch.tensor(list(numbers), dtype=torch.int64, device=hardware.device())
    dist.all_reduce(together, op=dist.ReduceOp.MAX, group=group)  # type: ignore[arg-type]
    return together.tolist()
