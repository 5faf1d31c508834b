"""What the ranks of a conversion test run; importable by name."""

import contextlib
import io
import runpy
from pathlib import Path
from typing import Any

import torch

import megatron_irl.platform  # noqa: F401
from megatron_irl.convert.export import export_hf
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.load import load_hf_weights
from megatron_irl.errors import UserError
from tests.dist.jobs import Layout, build


def round_trip(hf: str, layout: Layout, out: str, **options: Any) -> None:
    """Load a folder under a layout and write it out again."""
    topology, chunks, _, _ = build(hf, layout)
    source = Path(hf)
    config = read_hf_config(source)
    export_hf(
        chunks, architecture(config), config, Path(out), source_dir=source, topology=topology,
        **options,
    )


def full_disk(hf: str, out: str) -> str:
    """Export while every shard write fails as on a full disk; returns the message."""
    from megatron_irl.convert import export

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    original, export.ShardedWriter.add = export.ShardedWriter.add, refuse
    try:
        round_trip(hf, {}, out)
    except UserError as error:
        return str(error)
    finally:
        export.ShardedWriter.add = original
    return "no error"


def load_message(hf: str, good: str) -> str:
    """What loading ``hf`` into a model built from ``good`` says."""
    _, chunks, _, _ = build(good, {})
    before = [p.detach().clone() for p in chunks[0].parameters()]
    try:
        arch = architecture(read_hf_config(Path(hf)))
        load_hf_weights(chunks, arch, Path(hf), tp_rank=0, tp_size=1)
    except UserError as error:
        return str(error)
    unchanged = all(map(torch.equal, before, chunks[0].parameters()))
    return f"no error, unchanged={unchanged}"


def tool(path: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a tool's main()."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = runpy.run_path(path)["main"](arguments)
    return code, errors.getvalue()
