"""One start of the real command, its processes, and what it is hit with."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from tests.faults.forked import NAME_LENGTH, ForkedLauncher, Zygote

ROOT = Path(__file__).parents[2]
_MARK = "MEGATRON_IRL_FAULTS"
HANG_SECONDS = 600.0  # after a fault everything must be gone, or the run finished, in this time
LEFT_SECONDS = 20.0  # a process may outlive its launcher by so much


class Start:
    """``megatron-irl train`` in a session of its own; all of its processes carry a mark.

    The mark is in the environment and, where the start is a fork of ``zygote``, in the name of the
    process: a fork keeps the environment that the kernel shows of its parent.

    Attributes:
        seconds: Since the start.
        opened_at: When the run folder was taken, in seconds since the start; None before.
    """

    def __init__(self, recipe: Path, folder: Path, zygote: Zygote | None = None) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.log = folder.with_suffix(".log")
        self.opened_at: float | None = None
        self._leases = set(folder.glob("lease.*.json"))
        self._begun = time.monotonic()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                    _MARK: self.mark, "CUDA_VISIBLE_DEVICES": ""}
        self.launcher: subprocess.Popen[bytes] | ForkedLauncher
        if zygote is not None:
            self.launcher = zygote.start(
                ["train", str(recipe)], cwd=str(folder.parent), env=environment,
                log=str(self.log), name=self.mark)
            return
        with open(self.log, "wb") as log:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "megatron_irl", "train", str(recipe)],
                cwd=folder.parent, env=environment, stdout=log, stderr=log, start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def look(self) -> int | None:
        """Notice what has happened; the exit code once it has ended."""
        if self.opened_at is None and set(self.folder.glob("lease.*.json")) - self._leases:
            self.opened_at = self.seconds
        return self.launcher.poll()

    def processes(self) -> list[int]:
        """Everything of this start that runs, the launcher too."""
        wanted, found = f"{_MARK}={self.mark}".encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (
                    wanted in (entry / "environ").read_bytes()
                    or (entry / "comm").read_text().strip() == self.mark[:NAME_LENGTH]
                ):
                    if (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                        found.append(int(entry.name))
        return sorted(found)

    def ranks(self) -> list[int]:
        """The processes that the launcher started."""
        pid = self.launcher.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        with contextlib.suppress(OSError):
            return sorted(int(word) for word in children.read_text().split())
        return []

    def hit(self, number: signal.Signals, pids: list[int]) -> None:
        """Signal processes of this start; those that are gone are passed over."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def finish(self) -> int | None:
        """Wait for the end; the launcher's exit code, or None if it hangs."""
        deadline = time.monotonic() + HANG_SECONDS
        while self.look() is None:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        return self.launcher.returncode

    def left(self) -> list[str]:
        """Processes that have outlived the launcher for too long, by their command lines."""
        deadline = time.monotonic() + LEFT_SECONDS
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        words = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                words.append(f"{pid} {line.decode()[:200]}")
        return words

    def end(self) -> None:
        """Kill what is left, whatever it is."""
        self.hit(signal.SIGKILL, self.processes())
        self.launcher.wait()
