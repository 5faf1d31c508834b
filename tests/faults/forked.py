"""Starts that skip the imports: a process that has made them forks the launcher, that its ranks.

What comes after the imports is the real thing: the command's ``main`` in the launcher, which starts
and ends its ranks as ever, and the same ``main`` in every rank. Two steps are replaced. Where the
launcher would execute a new interpreter it forks itself (``ForkedRank``), and the end of a forked
process is ``_leave``, which does what the interpreter's end does up to its own memory.

    python -m tests.faults.forked      requests on standard input, answers on standard output

Ranks of the tests' pool are forks of it, too (``tests.dist.pool``).
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
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
_PR_SET_NAME, NAME_LENGTH = 15, 15  # a process's name, which its forks inherit
_HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# What a run imports on its way, besides the package's own modules.
_LATE = ("pyarrow.parquet", "safetensors.torch")
# Arrow's allocator would start a thread, and a fork copies only one.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


class Zygote:
    """The process with the imports, seen from the harness; its methods may be called by threads."""

    def __init__(self) -> None:
        environment = os.environ | ONE_THREAD | {
            "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
        }
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forked"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )

    def start(self, argv: Sequence[str], *, log: str, **how: Any) -> "ForkedLauncher":
        """Fork ``python -m MODULE ARGV``, ``megatron_irl`` if not said; see ``_launch``."""
        pid = self.ask(argv=[str(word) for word in argv], log=log, **how)
        return ForkedLauncher(self, pid, Path(log))

    def start_rank(self, address: str) -> "ForkedLauncher":
        """Fork a rank of the pool, see ``tests.dist.worker``."""
        return ForkedLauncher(self, self.ask(rank=address))

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

    def __init__(self, zygote: Zygote, pid: int, log: Path = Path(os.devnull)) -> None:
        self._zygote, self.pid, self._log = zygote, pid, log
        self.returncode: int | None = None

    @property
    def said(self) -> str:
        """What it and its ranks have written by now."""
        return self._log.read_text()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        return _wait(self, timeout)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _wait(process: "ForkedLauncher | ForkedRank", timeout: float | None) -> int:
    deadline = None if timeout is None else time.monotonic() + timeout
    while (code := process.poll()) is None:
        if deadline is not None and time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(f"process {process.pid}", timeout or 0.0)
        time.sleep(0.01)
    return code


class ForkedRank:
    """What the launcher starts instead of ``subprocess.Popen(command, ...)``."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], start_new_session: bool,
        pass_fds: Sequence[int],
    ) -> None:
        assert list(command[:2]) == [sys.executable, "-m"] and start_new_session
        del pass_fds  # a fork has them all
        self.returncode: int | None = None
        # A signal between the fork and the handlers' reset would run the launcher's in the rank.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        self.pid = os.fork()
        if self.pid == 0:
            _become(command[2], command[3:], env)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        return _wait(self, timeout)


def main() -> None:
    """Import, then fork what is asked for until standard input ends."""
    import_package()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _serve(request["rank"]) if "rank" in request else _launch(**request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def import_package() -> None:
    """Import what a run may need, for forks; no thread is left by it."""
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


def _serve(address: str) -> NoReturn:
    """In the fork: be a rank of the pool."""
    from tests.dist.worker import main as serve

    os.setsid()
    os.dup2(2, 1)  # what is written there would be taken for an answer
    _leave(lambda: serve(address))


def _launch(
    argv: Sequence[str], cwd: str, env: Mapping[str, str], log: str, name: str = "launcher",
    module: str = "megatron_irl",
) -> NoReturn:
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
    # What else the command starts is started as ever.
    forking = SimpleNamespace(**vars(subprocess) | {"Popen": ForkedRank})
    ranks.subprocess = forking  # type: ignore[assignment]
    _become(module, argv, env)


def _become(module: str, argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Be ``python -m MODULE ARGV``, in a session of its own, and end."""
    os.setsid()
    for number in _HANDLED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT
                      else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    os.environ.clear()
    os.environ.update(env)
    random.seed()
    sys.argv = [module, *argv]
    _leave(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def _leave(run: Callable[[], object]) -> NoReturn:
    """Run and end as the interpreter would: threads are waited for, what is registered is called.

    The stack below belongs to the launcher, whose ``finally`` would end the other ranks.
    """
    code = 1
    try:
        run()
        code = 0
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
