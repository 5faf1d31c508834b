"""Chosen optimizer steps under torch's profiler (section ``profile``)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_irl.config import ProfileConfig


@contextmanager
def recorded(options: ProfileConfig, folder: Path, *, step: int, rank: int) -> Iterator[None]:
    """Record the block if it is the work of a chosen step on a chosen rank.

    Leaves ``profile/step_NNNNNN_rank_R.json`` in the run folder. Collectives: none.
    """
    if step not in options.steps or rank not in options.ranks:
        yield
        return
    with torch.profiler.profile(
        profile_memory=options.memory, with_stack=options.stacks, record_shapes=True
    ) as profiler:
        yield
    target = folder / "profile" / f"step_{step:06d}_rank_{rank}.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(target))
    except (OSError, RuntimeError) as error:  # it only shows the run, which goes on
        warnings.warn(f"the profile {target} could not be written: {error}", stacklevel=2)
