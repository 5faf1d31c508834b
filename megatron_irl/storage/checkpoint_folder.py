"""Which checkpoints a folder has, and which of them stay."""

import shutil
from pathlib import Path

from megatron_irl.storage.commit import put_back


class CheckpointFolder:
    """Folders ``step_NNNNNN``, as one process sees them.

    Args:
        keep: How many of the newest ``prune`` leaves.
        keep_every: It leaves those of steps that this divides, too.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int | None = None) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name[5:]) for p in self.folder.glob("step_*") if p.name[5:].isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def describe_latest(self) -> str:
        """The newest checkpoint's path, for messages."""
        steps = self.steps()
        return str(self.path(steps[-1])) if steps else "the starting model; no checkpoint yet"

    def put_back(self) -> None:
        """Undo a replacement that was killed between its two renames.

        For the run itself, before it looks for its newest checkpoint: to anybody else a
        replacement in progress looks the same.
        """
        for old in self.folder.glob(".step_*.old"):
            put_back(self.folder / old.name.removeprefix(".").removesuffix(".old"))

    def discard_unfinished(self) -> None:
        """Remove what killed saves left: nobody else knows of them. For the run itself."""
        for pattern in (".step_*.partial", ".step_*.old"):
            for left in self.folder.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)

    def prune(self, step: int) -> None:
        """Remove what is not to be kept now that ``step`` is saved.

        Later ones go too: the run has passed them over, or it would stand behind them.
        """
        steps = self.steps()
        # By what is on disk, not by what this process has saved: a run that resumed counts too.
        newest = [s for s in steps if s <= step][-self.keep :]
        for other in steps:
            is_kept = other in newest or (
                other < step and self.keep_every is not None and other % self.keep_every == 0
            )
            if not is_kept:
                shutil.rmtree(self.path(other), ignore_errors=True)
