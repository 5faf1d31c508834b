"""Three ranks of ``test_hangs``, two wait in a collective for the last: ``... FOLDER``."""

import os
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_irl.cli.ranks import run_ranks
from megatron_irl.config import ParallelConfig
from megatron_irl.parallel.topology import initialize
from megatron_irl.run.watchdog import Watchdog


def in_the_collective() -> None:
    dist.all_reduce(torch.ones(1))


def elsewhere() -> None:
    threading.Event().wait()


def main(folder: Path) -> None:
    # A log each, as docs/slurm.md has it: stacks of several ranks in one would be mixed.
    log = os.open(folder / f"rank{os.environ['RANK']}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    topology = initialize(ParallelConfig())
    watchdog = Watchdog(topology, seconds=4.0, slow_seconds=60.0, folder=folder / "hangs")
    dist.barrier()
    topology.heart.phase, topology.heart.is_slow = "training", False
    watchdog.start()
    (elsewhere if topology.rank == topology.world_size - 1 else in_the_collective)()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(Path(sys.argv[1]))
    else:
        sys.exit(run_ranks(sys.argv[1:], 3, ("-m", "tests.cli.hung_rank")))
