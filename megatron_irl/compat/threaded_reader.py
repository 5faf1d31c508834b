"""torch's checkpoint reader with several threads.

torch 2.14 reads a rank's tensors one after another, each through the interpreter's file objects.
To be removed when ``FileSystemReader`` reads in parallel by itself.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from megatron_irl.hardware.host_copy import threads_for_files

from megatron.core.dist_checkpointing.strategies import torch as strategies  # isort: skip


class ThreadedReader(FileSystemReader):
    """As ``FileSystemReader``; what a rank reads is divided among threads, each by itself."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        def place(item: Any) -> tuple[str, int]:
            stored = self.storage_data[item.storage_index]
            return stored.relative_path, stored.offset

        def read(items: list[Any]) -> None:
            FileSystemReader.read_data(self, replace(plan, items=items), planner)

        items = sorted(plan.items, key=place)
        count = max(1, min(threads_for_files(), len(items)))
        # The planner is shared: every item fills a tensor, or a name, of its own.
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(read, [items[i::count] for i in range(count)]))
        done: Future[None] = Future()
        done.set_result(None)
        return done


@contextmanager
def in_threads() -> Iterator[None]:
    """Within the block Megatron reads checkpoints with ``ThreadedReader``."""
    original = strategies._get_filesystem_reader
    strategies._get_filesystem_reader = lambda folder, *_, **__: ThreadedReader(folder)
    try:
        yield
    finally:
        strategies._get_filesystem_reader = original
