"""Whether a checkpoint is what was written, found by all ranks together."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megatron_irl.errors import UserError
from megatron_irl.hardware.host_copy import threads_for_files
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.storage.manifest import files_of, shares, wrong_contents, wrong_sizes

Verify = Literal["sizes", "hashes"]


def damage(checkpoint: Path, verify: Verify, topology: Topology) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; None: nothing. Collective.

    Rank 0 looks at the files' sizes. Their bytes are read by all ranks, each its share.
    """
    def look() -> tuple[str | None, list[dict[str, Any]]]:
        try:
            files = files_of(checkpoint)
            return wrong_sizes(checkpoint, files), shares(files or {}, topology.world_size)
        except UserError as error:
            return str(error), []

    # The manifest is read once, by rank 0, and every rank told what it says of its share.
    wrong, divided = on_main(look, topology)
    if wrong is not None or verify == "sizes":
        return wrong
    mine = divided[topology.rank]
    # What is found is a sentence and no error, so that no rank leaves before the gather.
    with ThreadPoolExecutor(threads_for_files()) as pool:
        found = list(pool.map(lambda name: wrong_contents(checkpoint / name, mine[name]), mine))
    by_rank: list[Any] = [found]
    if topology.world_size > 1:
        by_rank = [None] * topology.world_size
        dist.all_gather_object(by_rank, found)
    return next((wrong for found in by_rank for wrong in found if wrong), None)
