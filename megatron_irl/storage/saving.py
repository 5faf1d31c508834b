"""One checkpoint on its way to disk: written by every rank's thread, committed by rank 0's.

The threads need no collective. A rank that has written its files says so by a small file beside
them, ``.rank_NNNNN.json``: sizes, checksums and where each tensor is. When rank 0 has them all it
writes ``.metadata`` and the manifest and renames the folder; training may be in the middle of
anything. A thread ends with its process, also when that is killed, and leaves at worst a dotted
folder.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_irl.compat.checkpoint_writer import (
    Abandoned,
    PlanOnly,
    finish,
    write_buckets,
)
from megatron_irl.hardware.host_copy import threads_for_files
from megatron_irl.storage.commit import commit_folder, entry, entry_of, write_errors
from megatron_irl.storage.manifest import write_manifest

from megatron.core.dist_checkpointing.core import (  # isort: skip
    CheckpointingConfig,
    save_config,
)

ADVICE = ("The previous checkpoint is untouched; free some space, then start the same command "
          "again.")
_POLL_SECONDS = 0.02, 0.5  # between two looks for the other ranks' files, at first and later


@dataclass
class Saving:
    """A rank's part of a checkpoint that is planned, copied if need be, and not yet on disk.

    Attributes:
        final: The checkpoint's folder; ``partial`` is where it is built.
        plan: Megatron's, with what this rank writes.
        rank, world_size: Of the run.
        fence: Raises if the folder is not ours any more; called before the commit.
        committed: Called on rank 0 once the folder is in its place.
        notes: What else the manifest says.
        stall_seconds: How long training was stopped for it.
        background_seconds: How long it took after that, on rank 0 until the commit.
        bytes: What this rank wrote, on rank 0 what the checkpoint has.
    """

    final: Path
    partial: Path
    plan: PlanOnly
    rank: int
    world_size: int
    fence: Callable[[], None]
    committed: Callable[[], None]
    notes: dict[str, Any]
    stall_seconds: float = 0.0
    background_seconds: float = 0.0
    bytes: int = 0
    is_written: bool = False
    is_ended: bool = False
    _failures: dict[str, BaseException] = field(default_factory=dict)
    _given_up: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Write, and on rank 0 commit, in a thread."""
        # No daemon: those are frozen in the middle of a write while the interpreter goes down. This
        # one is waited for, sees that the main thread has ended, and leaves (``_goes_on``).
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def status(self) -> tuple[int, int]:
        """(whether this rank still has something to do, whether it has failed), 0 or 1."""
        is_done = self.is_ended or (self.rank > 0 and self.is_written)
        return int(not is_done), int(bool(self._failures))

    def write(self) -> None:
        """Write this rank's files, or wait until the thread has.

        Raises:
            UserError: The disk is full or not writable.
        """
        if self._thread is None:
            self._try("write", self._write)
        elif self.rank:
            self._thread.join()
        else:  # its thread goes on, with the commit
            while not self.is_written and not self.is_ended:
                time.sleep(_POLL_SECONDS[0])
        self._raise("write")

    def commit(self) -> None:
        """Put the folder in its place, or wait until the thread has. On rank 0.

        Raises:
            UserError: As ``write``, or the folder is not ours any more.
        """
        if self._thread is None:
            self._try("commit", self._commit)
        else:
            self._thread.join()
        self._raise("write")
        self._raise("commit")

    def abandon(self) -> None:
        """Give up what is not committed, as a kill would; waits for the thread."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()
        if self.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _run(self) -> None:
        self._try("write", self._write)
        if self.rank == 0 and not self._failures:
            self._try("commit", self._commit)
        self.is_ended = True

    def _try(self, name: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        try:
            with write_errors(self.final, ADVICE):
                work()
        except Exception as error:  # kept for the rank's own thread, whatever it is
            self._failures[name] = error
        self.background_seconds += time.perf_counter() - start

    def _raise(self, name: str) -> None:
        if name in self._failures:
            raise self._failures[name]

    def _write(self) -> None:
        written = write_buckets(
            self.plan.buckets, self.partial, threads=threads_for_files(), go_on=self._goes_on
        )
        self.bytes = sum(file.bytes for file in written)
        said = {
            "files": {file.name: entry(file.bytes, file.crc32) for file in written},
            "results": [line for file in written for line in file.results],
        }
        path = self._report(self.rank)
        path.with_suffix(".tmp").write_text(json.dumps(said))
        path.with_suffix(".tmp").rename(path)  # whole or not at all, for rank 0 polls for the name
        self.is_written = True

    def _commit(self) -> None:
        reports = [self._wait_for(rank) for rank in range(self.world_size)]
        finish(self.plan, [report["results"] for report in reports])
        save_config(CheckpointingConfig(self.plan.backend, self.plan.version), str(self.partial))
        for rank in range(self.world_size):
            self._report(rank).unlink()
        files = {name: known for report in reports for name, known in report["files"].items()}
        small = {path.name: entry_of(path) for path in self.partial.iterdir()
                 if path.name not in files}
        self.bytes = sum(known["bytes"] for known in (files | small).values())
        write_manifest(self.partial, dict(sorted((files | small).items())), **self.notes,
                       stall_seconds=round(self.stall_seconds, 3))
        # As late as can be: files were written into a folder that is nobody's yet, and only the
        # rename would change what another process took over.
        self.fence()
        if not self._goes_on():
            raise Abandoned
        commit_folder(self.partial, self.final)
        self.committed()

    def _report(self, rank: int) -> Path:
        return self.partial / f".rank_{rank:05d}.json"

    def _wait_for(self, rank: int) -> dict[str, Any]:
        """What a rank says of its files; another host's may be seen late."""
        path, pause = self._report(rank), _POLL_SECONDS[0]
        while not path.exists():
            if not self._goes_on():
                raise Abandoned
            list(self.partial.iterdir())  # asks a network file system's server again
            time.sleep(pause)
            pause = min(1.5 * pause, _POLL_SECONDS[1])
        return json.loads(path.read_text())

    def _goes_on(self) -> bool:
        """Whether anybody is still interested; not once the process is on its way out."""
        return not self._given_up.is_set() and threading.main_thread().is_alive()
