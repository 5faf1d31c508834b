"""What a run was doing at an instant, from its folder alone."""

import contextlib
import os
from pathlib import Path

STARTING, SAMPLING, TRAINING = "starting", "sampling", "training"
COPYING, WRITING = "copying", "writing"  # of a checkpoint: before and after training goes on
INSTANTS = (STARTING, SAMPLING, TRAINING, COPYING, WRITING)
Saves = frozenset[tuple[str, int]]


def instant_of(folder: Path, *, is_open: bool, left: Saves = frozenset()) -> str:
    """One of ``INSTANTS``: the last that applies.

    A checkpoint is being written, in the background, from its first tensor file on until its folder
    is renamed. Before that it is planned and copied, and training waits.

    Args:
        is_open: The run has taken its folder.
        left: What was there before the start.
    """
    if not is_open:
        return STARTING
    for name, _ in unfinished_saves(folder) - left:
        with contextlib.suppress(FileNotFoundError):
            files = os.listdir(folder / "checkpoints" / name)
            return WRITING if any(n.startswith((".rank_", "__")) for n in files) else COPYING
    rounds = sorted((folder / "pairs").glob("round_*"))
    return TRAINING if rounds and (rounds[-1] / "manifest.json").exists() else SAMPLING


def unfinished_saves(folder: Path) -> Saves:
    """Checkpoints that are not committed, by name and inode: a killed run leaves its own."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder / "checkpoints"):
            if entry.name.startswith(".step_") and entry.name.endswith(".partial"):
                found.add((entry.name, entry.inode()))
    return frozenset(found)
