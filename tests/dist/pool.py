"""Gloo ranks that stay alive over many tests, forks of a process that has imported Megatron.

Every job gets a process group of its own: ranks 0 .. world_size - 1 of the four workers join it,
run one importable function, and leave it.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from megatron_irl.cli.ports import free_port
from tests.faults.forked import ForkedLauncher, Zygote

ROOT = Path(__file__).resolve().parents[2]
MAX_WORKERS = 4
MAX_THREADS = 600  # of a worker: gloo's, of groups that something still holds, and they wake up
GRACE_SECONDS = 10.0  # for the other ranks, once one has failed: they may wait for it for ever


class Pool:
    """Up to four worker processes, started on demand.

    A job that fails on one rank only, or runs out of time, costs the workers their lives (their
    peers hang in a collective); the next job starts new ones.

    Args:
        zygote: What the workers are forks of; None: each is a fresh process.
    """

    def __init__(self, zygote: Zygote | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        self._zygote = zygote
        self._processes: list[subprocess.Popen[bytes] | ForkedLauncher] = []
        self._pipes: list[Connection] = []

    def environment_of(self, rank: int) -> dict[str, str]:
        """What a rank's process and its jobs find in their environment beside the usual."""
        del rank
        return {"MEGATRON_IRL_PLATFORM": "cpu"}  # gloo, and more ranks than there may be GPUs

    def run(
        self, world_size: int, function: Callable[..., Any], *, timeout: float = 240.0,
        **arguments: Any,
    ) -> list[Any]:
        """Call ``function(**arguments)`` on every rank; returns the results in rank order.

        Raises:
            RuntimeError: A rank failed; the message holds its traceback.
        """
        assert 1 <= world_size <= MAX_WORKERS
        if any(_threads(process.pid) > MAX_THREADS for process in self._processes):
            self.close()
        self._start(world_size)
        port = free_port()
        for rank, pipe in enumerate(self._pipes[:world_size]):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            } | self.environment_of(rank)
            name = f"{function.__module__}:{function.__qualname__}"
            pipe.send_bytes(pickle.dumps((environment, name, arguments)))
        answers = self._collect(world_size, timeout)
        failed = {rank: text for rank, (ok, text) in answers.items() if not ok}
        if failed or len(answers) < world_size:
            missing = sorted(set(range(world_size)) - set(answers))
            if missing or len(failed) < world_size:
                self.close()
            texts = [f"rank {rank}:\n{text}" for rank, text in sorted(failed.items())]
            if missing:
                texts.append(f"ranks {missing} did not answer within {timeout:.0f} s")
            raise RuntimeError("\n".join(texts))
        return [answers[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        """End the workers; ``run`` may be called again.

        Each is ended with its process group: the helpers that a checkpoint's writer starts would
        outlive it, at 300 MB apiece.
        """
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self, count: int) -> None:
        while len(self._pipes) < count:
            address = str(Path(self._folder.name) / f"{time.monotonic_ns()}.sock")
            with Listener(address, "AF_UNIX") as listener:
                self._processes.append(
                    self._fresh(address) if self._zygote is None else
                    self._zygote.start_rank(address))
                self._pipes.append(listener.accept())

    def _fresh(self, address: str) -> subprocess.Popen[bytes]:
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path),
        } | self.environment_of(len(self._pipes))
        return subprocess.Popen(
            [sys.executable, "-m", "tests.dist.worker", address], cwd=ROOT, env=environment,
            start_new_session=True,
        )

    def _collect(self, world_size: int, timeout: float) -> dict[int, tuple[bool, Any]]:
        deadline = time.monotonic() + timeout
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < world_size and time.monotonic() < deadline:
            for rank in set(range(world_size)) - set(answers):
                if not self._pipes[rank].poll(0.005):
                    continue
                try:
                    answers[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except EOFError:
                    answers[rank] = (False, "the worker process died")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:  # it has died, or the system has no such files
        return 0
