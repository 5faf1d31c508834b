"""Megatron's checkpoint writer in threads of the saving process, its results and errors kept.

Megatron-Core 0.19 plans a save on all ranks and hands the writing to a process, forked for each
save or kept: half a gigabyte per rank that outlives a killed rank, and a manager process beside
it for the results. On CPU its copies are none for a tensor that is a storage of its own, so a
process that shares memory would see the next step's weights. And when a file cannot be written it
asserts, where the error's text is lost and the other ranks are left at a barrier.

Here its planning and its division into files are kept, and what is to be written is returned to the
caller. Threads do for writing it: torch writes tensors without holding the interpreter's lock. The
bytes are Megatron's; besides, each file's size and CRC-32 are found on the way.

To be removed when ``TorchDistSaveShardedStrategy`` can be given a writer, and that writer keeps
what became of a file by rank and speaks of failures instead of raising.
"""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    SerializationFormat,
    _StorageInfo,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from megatron_irl import hardware  # noqa: F401  (must precede megatron)

from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest  # isort: skip
from megatron.core.dist_checkpointing.strategies.torch import (  # isort: skip
    TorchDistSaveShardedStrategy,
)

_CHUNK = 16 << 20


@dataclass
class Bucket:
    """One file that this rank is to write.

    Attributes:
        name: Of the file.
        items: (torch's write item, bytes or tensor); tensors may still be on the device.
    """

    name: str
    items: list[tuple[Any, Any]]

    def tensors(self) -> list[Tensor]:
        return [data for _, data in self.items if isinstance(data, Tensor)]

    def replace_tensors(self, tensors: Iterator[Tensor]) -> None:
        """Take others in their places, in the order of ``tensors``."""
        self.items = [
            (item, next(tensors) if isinstance(data, Tensor) else data) for item, data in self.items
        ]


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Attributes:
        results: torch's, by item, as JSON takes them; see ``results_of``.
    """

    name: str
    bytes: int
    crc32: int
    results: list[list[Any]]


class PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's save strategy up to the point where files would be written.

    Attributes:
        buckets: What this rank is to write, after ``dist_checkpointing.save``.
        metadata: Of the whole checkpoint, on rank 0, without where things are stored.
        writer: torch's, which ``finish`` writes ``.metadata`` with.
    """

    def __init__(self, files: int) -> None:
        super().__init__(thread_count=files)
        self.buckets: list[Bucket] = []
        self.metadata: Metadata | None = None
        self.writer: Any = None

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any,
                   async_strategy: str = "mcore") -> AsyncRequest:
        del async_strategy
        with _writer_class(_PlanningWriter):
            return super().async_save(sharded_state_dict, checkpoint_dir, "mcore")  # type: ignore

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, async_strategy: Any
    ) -> AsyncRequest:
        del async_strategy
        self.writer, self.buckets = writer, writer.buckets
        self.metadata = save_state_dict_ret[1]
        # Every rank's plan, for a cache that is not used: as much again as the rest of the file.
        vars(self.metadata or self).pop("all_local_plans", None)
        return AsyncRequest(None, (), [])


class _PlanningWriter(filesystem_async.FileSystemWriterAsync):
    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        divided = filesystem_async._split_by_size_and_type(self.thread_count, plan.items)
        self.buckets = [
            Bucket(f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}",
                   [(item, _plain(planner.resolve_data(item))) for item in items])
            for number, items in enumerate(divided) if items
        ]


def write_buckets(
    buckets: Sequence[Bucket], folder: Path, *, threads: int, go_on: Callable[[], bool]
) -> list[Written]:
    """Write every bucket to its file, several at a time. Tensors are let go as they are written.

    Args:
        go_on: Asked before each item; once it says no the rest is left.

    Raises:
        OSError: A file could not be written.
        Abandoned: ``go_on`` said no.
    """
    torch.serialization.set_crc32_options(False)  # torch's own, half as fast and never read
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="checkpoint") as pool:
        return list(pool.map(lambda bucket: _write(bucket, folder, go_on), buckets))


class Abandoned(Exception):
    """A save was given up on purpose."""


def finish(plan: PlanOnly, written: Sequence[Sequence[list[Any]]]) -> None:
    """Write the checkpoint's ``.metadata``; on rank 0.

    Args:
        written: What was written, by rank: the ``results`` of all its files.
    """
    plan.writer.finish(plan.metadata, [results_of(each) for each in written])


def results_of(lines: Sequence[list[Any]]) -> list[WriteResult]:
    """Results as torch has them, from what ``Written.results`` says of them."""
    return [
        WriteResult(MetadataIndex(name, None if at is None else torch.Size(at), index), length,
                    _StorageInfo(file, offset, length))
        for name, at, index, file, offset, length in lines
    ]


def _write(bucket: Bucket, folder: Path, go_on: Callable[[], bool]) -> Written:
    lines: list[list[Any]] = []
    # Private names of torch 2.14: what its own writer does with an item, and no more.
    transforms = _StorageWriterTransforms()
    with open(folder / bucket.name, "wb") as file:
        checked = _Checked(file)
        while bucket.items:  # let go of one by one: the copy in host memory is freed as it goes
            if not go_on():
                raise Abandoned
            item, data = bucket.items.pop(0)
            if isinstance(data, Tensor):  # torch saves the storage, so a view must have its own
                whole = data.device.type == "cpu" and _fills_its_storage(data)
                data = data.detach() if whole else data.detach().to("cpu", copy=True).contiguous()
            result = _write_item(
                transforms, checked, data, item, bucket.name,  # type: ignore[arg-type]
                SerializationFormat.TORCH_SAVE,
            )
            at, stored = result.index.offset, result.storage_data
            lines.append([result.index.fqn, None if at is None else list(at), result.index.index,
                          stored.relative_path, stored.offset, stored.length])
        file.flush()
        os.fsync(file.fileno())  # by the host that wrote it: rank 0's sync reaches no other's pages
    return Written(bucket.name, checked.size, checked.crc32, lines)


class _Checked:
    """A file being written that keeps its size and CRC-32."""

    def __init__(self, file: Any) -> None:
        self._file, self.size, self.crc32 = file, 0, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):  # so that the second look finds it in the cache
            part = view[start : start + _CHUNK]
            self.crc32 = zlib.crc32(part, self.crc32)
            self._file.write(part)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: torch closes the view of each item, and the file has more."""


def _plain(data: Any) -> Any:
    """Quantized tensors as the ordinary ones that they stand for."""
    quantized = isinstance(data, Tensor) and "dequantize" in type(data).__dict__
    return data.dequantize() if quantized else data


def _fills_its_storage(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and (
        tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


@contextmanager
def _writer_class(writer: type) -> Iterator[None]:
    """Let Megatron's strategy, which asks a module for its writer, have another one."""
    original = filesystem_async.FileSystemWriterAsync
    filesystem_async.FileSystemWriterAsync = writer  # type: ignore[misc]
    try:
        yield
    finally:
        filesystem_async.FileSystemWriterAsync = original  # type: ignore[misc]
