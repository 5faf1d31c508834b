"""Who a process is, so that another one can tell whether it still lives; and dying together."""

import ctypes
import os
import signal
import socket
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def this_host() -> str:
    """Name of this machine's process table: host, boot and PID namespace.

    Process ids mean the same only where all three are equal: a container has its own, and so has
    the same machine after a restart.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux: only the host's name is known
        boot = namespace = "?"
    return f"{socket.gethostname()} {boot} {namespace}"


def start_time(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if there is none.

    With the process id it names a process for good: ids are used again. A zombie has ended.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the one that started it ends, even by SIGKILL.

    Without effect where the system has no such service.

    Args:
        parent: Process id of the parent, if known: it may have ended before this call.
    """
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
