"""How much of the machine's memory a process can have: what is free, within its cgroup's limits.

In a container, and in a Slurm job that asked for part of a node, ``/proc/meminfo`` speaks of the
whole machine; who takes what it says is killed.
"""

import os
from collections.abc import Iterator
from pathlib import Path


def free(root: Path = Path("/")) -> int:
    """Bytes that can still be taken: the least of what the machine and each cgroup above us have.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
        machine = 1024 * int(kib)
    except (OSError, ValueError):  # not Linux: all there is
        machine = _physical()
    # Cached files count as used; the system takes them back before it kills. On both of its lists,
    # as MemAvailable counts them: weights or a checkpoint read twice are on the active one.
    left = (limit - used + cached for limit, used, cached in _limits(root))
    return max(0, min([machine, *left]))


def total(root: Path = Path("/")) -> int:
    """Bytes that can be taken at all: the machine's memory, or the least limit above us."""
    return min([_physical(), *(limit for limit, _, _ in _limits(root))])


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits(root: Path) -> Iterator[tuple[int, int, int]]:
    """(limit, used, cached files) in bytes of every cgroup above this process that has a limit."""
    for folder, (limit_name, used_name, prefix) in _groups(root):
        limit = _number(folder / limit_name)
        if limit is not None:
            lists = (f"{prefix}inactive_file", f"{prefix}active_file")
            cached = sum(_field(folder / "memory.stat", name) for name in lists)
            yield limit, _number(folder / used_name) or 0, cached


_Names = tuple[str, str, str]
"""Of the files with limit and use, and what stands before a whole group's lines of statistics."""

_V2: _Names = ("memory.max", "memory.current", "")
_V1: _Names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _groups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """Folders of the memory controllers of this process, from its own up to the mount."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        # Some containers mount their own group where the machine's root would be, but are told
        # the machine's path: what is not there is passed over, and the mount itself looked at.
        own = mount / path.lstrip("/")
        yield from ((folder, names) for folder in (own, *own.parents)
                    if folder == mount or mount in folder.parents)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or no number (``max``) in it."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int:
    try:
        found = dict(line.split() for line in path.read_text().splitlines())
        return int(found.get(name, 0))
    except (OSError, ValueError):
        return 0
