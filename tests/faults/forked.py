"""Starts that skip the imports: a process that has made them forks the launcher, that its ranks.

What comes after the imports is the real thing: the command's ``main`` in the launcher, which starts
and ends its ranks as ever, and the same ``main`` in every rank. Two steps are replaced. Where the
launcher would execute a new interpreter it forks itself (``ForkedRank``), and the end of a forked
process is ``_leave``, which does what the interpreter's end does up to its own memory.

    python -m tests.faults.forked      requests on standard input, answers on standard output
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
_PR_SET_NAME, NAME_LENGTH = 15, 15  # a process's name, which its forks inherit
_HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# What a run imports on its way, besides the package's own modules.
_LATE = ("pyarrow.parquet", "safetensors.torch")


class Zygote:
    """The process with the imports, seen from the harness; its methods may be called by threads."""

    def __init__(self) -> None:
        # Arrow's allocator would start a thread, and a fork copies only one.
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
        }
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forked"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )

    def start(self, argv: Sequence[str], **how: Any) -> "ForkedLauncher":
        """Fork ``megatron-irl ARGV``; ``how`` as ``_launch`` takes it."""
        return ForkedLauncher(self, self.ask(argv=list(argv), **how))

    def ask(self, **request: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with self._lock:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            return json.loads(stdout.readline())

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


class ForkedLauncher:
    """As ``subprocess.Popen``, of a child of the zygote."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote, self.pid = zygote, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.ask(poll=self.pid)
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code


class ForkedRank:
    """What the launcher starts instead of ``subprocess.Popen(command, ...)``."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], start_new_session: bool
    ) -> None:
        assert list(command[:3]) == [sys.executable, "-m", "megatron_irl"] and start_new_session
        self.returncode: int | None = None
        # A signal between the fork and the handlers' reset would run the launcher's in the rank.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        self.pid = os.fork()
        if self.pid == 0:
            _become(command[3:], env)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout or 0.0)
            time.sleep(0.005)
        return code


def main() -> None:
    """Import, then fork what is asked for until standard input ends."""
    _import()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _launch(**request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _import() -> None:
    import megatron_irl

    for module in pkgutil.walk_packages(megatron_irl.__path__, "megatron_irl."):
        # Some rooms need packages that are extras; a run of the cases does without them.
        with contextlib.suppress(ImportError):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in _LATE:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: a fork has only one of them"
    import torch

    assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, every page of every fork


def _launch(argv: Sequence[str], cwd: str, env: Mapping[str, str], log: str, name: str) -> NoReturn:
    """In the fork: be the launcher, under a process name that its ranks inherit."""
    from megatron_irl.cli import ranks

    for number, path, flags in ((0, os.devnull, os.O_RDONLY),
                                (1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.dup2(1, 2)
    os.chdir(cwd)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:NAME_LENGTH], 0, 0, 0)
    ranks.subprocess.Popen = ForkedRank  # type: ignore[misc,assignment]
    _become(argv, env)


_POPEN = subprocess.Popen


def _become(argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Be ``python -m megatron_irl ARGV``, in a session of its own, and end."""
    os.setsid()
    for number in _HANDLED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT
                      else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    if "RANK" in env:
        subprocess.Popen = _POPEN  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(env)
    random.seed()
    sys.argv = ["megatron-irl", *argv]
    from megatron_irl.cli import main as command

    _leave(lambda: command(list(argv)))


def _leave(run: Callable[[], int]) -> NoReturn:
    """Run and end as the interpreter would: threads are waited for, what is registered is called.

    The stack below belongs to the launcher, whose ``finally`` would end the other ranks.
    """
    code = 1
    try:
        code = run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
