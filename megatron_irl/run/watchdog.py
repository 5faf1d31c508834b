"""Ends a run that gets no further: with rank, phase and stacks in the log, in minutes.

A thread on every rank reads the rank's heartbeat, and another tells it to all ranks. A rank that
is silent because it waits for one that gets on is left alone. One that hangs takes the signs of
all, as ranks wait for each other in collectives, and one whose process was stopped tells nothing.
Each then says where it stands, the first of a node has the others of the node show their stacks
too, and the process ends, which has the launcher end the rest.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_irl.errors import HUNG
from megatron_irl.parallel.beat_board import BeatBoard
from megatron_irl.parallel.topology import Topology
from megatron_irl.storage.processes import start_time, this_host

SHOW_STACKS = signal.SIGUSR2
_SHOWING_SECONDS = 5.0  # for the other ranks of the node to write their stacks
_STATES = {"T": "stopped by a signal (SIGSTOP)", "t": "stopped by a debugger",
           "D": "waiting for a disk or a device", "R": "running", "S": "waiting"}


@dataclass(frozen=True)
class Mate:
    """Another rank of this node."""

    rank: int
    pid: int
    started: int | None

    def state(self) -> str:
        """What the kernel says of it."""
        if start_time(self.pid) != self.started:
            return "gone"
        with contextlib.suppress(OSError):
            letter = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return _STATES.get(letter, letter)
        return "gone"


class Watchdog:
    """Watches this rank's heartbeat from ``start`` until ``stop``.

    Args:
        seconds: Longest time without a sign of progress; 0: never ends anything.
        slow_seconds: The same in phases that give no signs (a save, an export).
        folder: Where the first rank of a node that notices leaves a note.

    Collectives: construction, over every rank of the run.
    """

    def __init__(
        self, topology: Topology, *, seconds: float, slow_seconds: float, folder: Path
    ) -> None:
        self.topology, self.heart = topology, topology.heart
        self.seconds, self.slow_seconds = seconds, max(seconds, slow_seconds)
        self.folder = folder
        self._ended = threading.Event()
        self._board, self._others_until = BeatBoard(topology), 0.0
        self._one_is_stopped = False  # its process has told nothing for so long
        self.mates, self._token = _meet(topology)

    def start(self) -> None:
        if not self.seconds:
            return
        self.heart.beat()
        stream: Any = sys.__stderr__
        # In C: it also shows the stack of a thread that is inside NCCL and runs no Python.
        faulthandler.register(SHOW_STACKS, file=stream, all_threads=True)
        threading.Thread(target=self._live, name="watchdog", daemon=True).start()
        threading.Thread(target=self._talk, name="watchdog's word", daemon=True).start()

    def stop(self) -> None:
        if self.seconds and not self._ended.is_set():
            self._ended.set()
            faulthandler.unregister(SHOW_STACKS)

    def _live(self) -> None:
        # A thread of Python: it does not look while the main thread keeps the interpreter's lock,
        # but waiting in a collective does not keep it.
        interval = min(5.0, self.seconds / 10)
        looked = time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            if now - looked > 10 * interval:  # this very process was stopped, or the machine slept
                self.heart.beat()
            looked = now
            silent, limit = now - self.heart.last, self._limit
            if silent > self.seconds and self._one_is_stopped:
                self._give_up(silent, self.seconds)  # slow or not: what it waits for will not come
            elif silent > limit and time.time() > self._others_until:
                self._give_up(silent, limit)

    @property
    def _limit(self) -> float:
        return self.slow_seconds if self.heart.is_slow else self.seconds

    def _talk(self) -> None:
        """Tell the other ranks until when this one may be silent, and hear it of them.

        Beside ``_live``, which must not wait for a store that does not answer. What was heard last
        runs out by itself.
        """
        while not self._ended.wait(min(10.0, self.seconds / 10)):
            silent, limit = time.monotonic() - self.heart.last, self._limit
            with contextlib.suppress(RuntimeError, ValueError):  # no store, no word
                self._board.tell(time.time() - silent + limit)
                if silent < self.seconds / 2:  # nobody asks who gets on
                    self._one_is_stopped = False
                elif heard := self._board.heard():
                    self._others_until = heard.until
                    self._one_is_stopped = time.time() - heard.oldest > self.seconds

    def _give_up(self, silent: float, limit: float) -> None:
        text = self.describe(silent, limit)
        stream: Any = sys.__stderr__
        stream.write(text + "\n")
        stream.flush()
        faulthandler.dump_traceback(file=stream, all_threads=True)
        if self._is_first_of_node(text):
            for mate in self.mates:
                if mate.state() != "gone":
                    with contextlib.suppress(OSError):
                        os.kill(mate.pid, SHOW_STACKS)
        time.sleep(_SHOWING_SECONDS)
        os._exit(HUNG)  # an exception, or sys.exit, would wait for the main thread's collective

    def describe(self, silent: float, limit: float) -> str:
        """What this rank knows, for the log."""
        topology = self.topology
        key = "hang_seconds" if limit == self.seconds else "timeout_minutes"
        others = ", ".join(f"rank {mate.rank} (process {mate.pid}) is {mate.state()}"
                           for mate in self.mates)
        return (
            f"megatron-irl: [rank {topology.rank} of {topology.world_size} on "
            f"{this_host().split()[0]}] no progress for {silent:.0f} s in {self.heart.phase} "
            f"({self.heart.place or 'before the first step'}; tensor rank {topology.tp_rank}, "
            f"pipeline rank {topology.pp_rank}, data rank {topology.dp_rank}); the limit is "
            f"{limit:.0f} s (parallel.{key}). On this node: {others or 'no other rank'}. The "
            f"process ends with code {HUNG}; the same command resumes the run. Stacks:"
        )

    def _is_first_of_node(self, text: str) -> bool:
        """Whether nobody on this node was faster; leaves the note that says so."""
        host = this_host().split()[0]
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"{host}_{self._token}.txt", "x") as file:
                file.write(text + "\n")
            return True
        return False


def _meet(topology: Topology) -> tuple[list[Mate], str]:
    """The other ranks of this node, and a name of this start that all ranks know."""
    me = (this_host(), os.getpid(), start_time(os.getpid()))
    all_ranks: list[Any] = [me]
    if topology.world_size > 1:
        all_ranks = [None] * topology.world_size
        dist.all_gather_object(all_ranks, me)
    mates = [Mate(rank, pid, started) for rank, (host, pid, started) in enumerate(all_ranks)
             if host == me[0] and rank != topology.rank]
    return mates, f"{all_ranks[0][1]}_{all_ranks[0][2]}"
