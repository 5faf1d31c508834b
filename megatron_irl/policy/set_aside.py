"""Weights set aside in memory while others take their place for one pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_irl import hardware


@contextmanager
def weights_set_aside(chunks: Sequence[Any]) -> Iterator[None]:
    """Within the block parameters may be overwritten; afterwards they are what they were.

    Collectives: none.
    """
    # Copied back in place: DDP's buffers, the optimizer and CUDA graphs know parameters by address.
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    aside = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, saved in zip(parameters, aside, strict=True):
                parameter.copy_(saved)
        del aside
        hardware.release_cached_memory()
