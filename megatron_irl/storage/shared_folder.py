"""The output folder as all ranks of a run have it: seen by each, and held by the run alone."""

import os
import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from megatron_irl.errors import UserError
from megatron_irl.parallel.main_rank import everywhere, on_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.storage.commit import write_file
from megatron_irl.storage.lease import Lease

VISIBLE_SECONDS = 30.0  # how late a rank may see a file of rank 0's


def hold(folder: Path, topology: Topology) -> Lease:
    """Take the folder for this run; on every rank a lease to check before it writes.

    Rank 0 takes it and keeps it alive; the others' is of the same hold. Collective over every rank.

    Raises:
        UserError: Another process is at work in the folder, on every rank.
    """
    mine: Lease | None = None

    def take() -> tuple[int, str]:
        nonlocal mine
        mine = Lease.acquire(folder)
        return mine.number, mine.token

    # Number and token go to every rank: each checks the lease file for itself before it writes.
    number, token = on_main(take, topology)
    return mine or Lease(folder, number, token)


def check_shared(folder: Path, topology: Topology) -> None:
    """Make sure that every rank sees what rank 0 writes into the folder. Collective.

    Rank 0 writes a small file and the others look for it, for a while: a network file system may
    show it late, a folder of another disk never.

    Raises:
        UserError: A rank does not see it, on every rank, with its host.
    """
    if topology.world_size == 1:
        return
    name = f".probe.{uuid.uuid4().hex}.tmp"
    name = on_main(lambda: write_file(folder / name, b"") or name, topology)

    def look() -> None:
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not _lists(folder, name):
            if time.monotonic() > deadline:
                raise UserError(
                    f"output_dir={folder} is not the same folder on every host: rank "
                    f"{topology.rank} on {socket.gethostname()} does not see what rank 0 wrote "
                    f"there {VISIBLE_SECONDS:.0f} seconds ago. Set output_dir to a folder of a "
                    "file system that all hosts share."
                )
            time.sleep(0.2)

    try:
        everywhere(look, topology)
    finally:
        if topology.is_main:
            (folder / name).unlink(missing_ok=True)
    dist.barrier()


def _lists(folder: Path, name: str) -> bool:
    """Whether a folder has a file; listing asks a network file system's server, a test may not."""
    return folder.is_dir() and name in os.listdir(folder)
