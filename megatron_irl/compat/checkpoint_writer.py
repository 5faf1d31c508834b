"""Megatron's checkpoint writer without its extra process, and with its errors kept.

Megatron-Core 0.19 writes a checkpoint's files in threads of the saving process, yet passes their
results through a ``multiprocessing`` manager: a process of half a gigabyte per rank that outlives a
killed rank. And when a file cannot be written it asserts in the saving rank, where the error's text
is lost and the other ranks are left at a barrier.

To be removed when ``filesystem_async`` takes results over a plain queue for synchronous saves and
``write_preloaded_data_multithread`` reports a failed bucket through the queue instead of raising.
A save in a process of its own needs Megatron's queue again: set ``_results_queue`` back to None.
"""

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_irl import hardware  # noqa: F401  (must precede megatron)

from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip

_Writer = filesystem_async.FileSystemWriterAsync


def install() -> None:
    """Replace the two; doing it again changes nothing."""
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
    _Writer.write_preloaded_data_multithread = staticmethod(write_buckets)  # type: ignore[assignment]


def write_buckets(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any
) -> None:
    """Write every bucket to its file, each in a thread, and put what became of them in ``results``.

    Either a dict of write results by bucket, or the first error: whoever collects the results then
    raises it on every rank. The arguments are Megatron's.
    """
    del rank
    extra = {"use_msc": use_msc} if use_msc else {}

    def write(index: int) -> Any:
        # Returns (index, results) or (index, error); never raises.
        return _Writer.write_preloaded_data(
            transforms, index, buckets[index], None, None, use_fsync=True, **extra
        )

    with ThreadPoolExecutor(max(1, len(buckets))) as pool:
        outcomes = [outcome for outcome in pool.map(write, range(len(buckets))) if outcome]
    errors = [value for _, value in outcomes if isinstance(value, Exception)]
    results.put(errors[0] if errors else dict(outcomes))
