"""Models on this process alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron_irl.hardware  # noqa: F401
from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.load import load_hf_weights
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.parallel.topology import initialize, shutdown


@contextmanager
def alone(folder: Path) -> Iterator[tuple[list[Any], Any]]:
    """(chunks, topology) of an HF folder's model."""
    parallel = ParallelConfig()
    topology = initialize(parallel)
    arch = architecture(read_hf_config(folder))
    chunks = build_chunks(build_config(arch, parallel), arch, topology)
    load_hf_weights(chunks, arch, folder, tp_rank=0, tp_size=1)
    yield chunks, topology
    shutdown()
