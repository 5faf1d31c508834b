"""A folder built under a dotted name: it appears whole, and a killed process can go on with it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_irl.errors import UserError
from megatron_irl.storage.commit import commit_folder, fresh_folder, unfinished, write_errors

STATE = ".conversion_state.json"


class Staging:
    """The unfinished folder beside ``final``.

    Args:
        final: The folder to be; must not exist.
        fingerprint: What the result depends on. An unfinished folder with another one is removed.

    Attributes:
        folder: Where to write.
        is_resumed: Whether an interrupted process left it.

    Raises:
        UserError: ``final`` exists.
    """

    def __init__(self, final: Path, fingerprint: dict[str, Any]) -> None:
        if final.exists():
            raise UserError(f"--out {final} exists. Choose another folder, or remove it.")
        self.final = final
        self.folder = unfinished(final)
        self._text = json.dumps(fingerprint, indent=2, sort_keys=True)
        state = self.folder / STATE
        self.is_resumed = state.is_file() and state.read_text() == self._text

    @contextmanager
    def open(self) -> Iterator[Path]:
        """Yield the folder, and put it in place on a normal exit.

        An error removes it; only a process that is killed or interrupted leaves it behind.

        Raises:
            UserError: The disk is full or not writable.
        """
        with write_errors(self.final):
            try:
                if not self.is_resumed:
                    fresh_folder(self.folder)
                    (self.folder / STATE).write_text(self._text)
                yield self.folder
                (self.folder / STATE).unlink()
                commit_folder(self.folder, self.final)
            except Exception:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def check_space(self, needed_bytes: int) -> None:
        """Raise UserError if the disk cannot hold what is still to be written."""
        parent = next(p for p in self.final.resolve().parents if p.exists())
        written = 0
        if self.is_resumed:
            written = sum(p.stat().st_blocks * 512 for p in self.folder.rglob("*") if p.is_file())
        free = shutil.disk_usage(parent).free
        if free + written < needed_bytes:
            raise UserError(
                f"--out {self.final} needs {needed_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB "
                "are free there. Choose another disk, or free some space."
            )


def file_stamps(folder: Path, pattern: str) -> dict[str, list[int]]:
    """Size and time of the matching files: whether they changed since."""
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in paths}
