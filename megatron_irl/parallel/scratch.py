"""Megatron's shared communication buffers, between inference and training."""

from typing import Any

from megatron_irl import hardware  # noqa: F401  (must precede megatron)

from megatron.core import parallel_state  # isort: skip


def drop_shared_buffers() -> None:
    """Forget the global all-gather buffers, which are allocated again on demand.

    Sequence parallelism gathers into one global buffer. If generation allocated it, it is an
    inference tensor, and the first training step after that may not write to it.
    """
    shared_buffers().clear()


def shared_buffers() -> dict[Any, Any]:
    """The buffers themselves, by use and type, to be changed in place; empty before there are."""
    # Private upstream (0.19.2): its own getter asserts where there is no buffer yet. To be removed
    # when Megatron's inference does not allocate what training writes to.
    buffer = parallel_state._GLOBAL_MEMORY_BUFFER
    return {} if buffer is None else buffer.buffer
