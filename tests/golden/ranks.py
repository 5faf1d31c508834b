"""What the ranks of a recorded run do; importable by name. Only the public command is called."""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def command(arguments: list[str], cwd: str) -> tuple[int, str]:
    """Exit code and standard error of a command on this rank, started in ``cwd``."""
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with captured_stderr() as said, quick_charts():
            from megatron_irl.cli import main

            return main(arguments), said()
    finally:
        os.chdir(before)


def environment() -> dict[str, Any]:
    """What the bits of a result depend on: libraries, processor, and the kernels chosen for it."""
    import platform
    from importlib.metadata import version

    import torch

    cpu = _cpu_fields()
    wanted = ("avx", "amx", "fma", "sse4", "f16c")
    packages = ("torch", "megatron-core", "numpy", "transformers", "tokenizers")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "cpu": " ".join(cpu.get(k, "?") for k in ("model name", "cpu family", "model", "stepping")),
        "cpu_flags": " ".join(sorted(
            flag for flag in cpu.get("flags", "").split() if flag.startswith(wanted))),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cpu_fields() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0].splitlines()
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first)}


@contextmanager
def captured_stderr() -> Iterator[Any]:
    """Send the process's standard error to a file; yields a function that reads it.

    By file descriptor: Megatron keeps the stream it finds when it is imported.
    """
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def quick_charts() -> Iterator[None]:
    """Leave the report's charts empty: drawing them takes longer than the small runs."""
    from matplotlib.figure import Figure

    def savefig(self: Figure, out: Any, **_: Any) -> None:
        text = "<svg></svg>"
        out.write(text if isinstance(out, io.TextIOBase) else text.encode())

    original, Figure.savefig = Figure.savefig, savefig  # type: ignore[assignment]
    try:
        yield
    finally:
        Figure.savefig = original  # type: ignore[method-assign]
