"""Tensors copied to host memory in one go: what a checkpoint makes training wait for."""

import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_irl import hardware

_ALIGNMENT = 4096
_PIECE = 64 << 20  # bytes that a thread copies at a time
_THREADS = 8  # at most; more are no faster on one bus, or one file system

Pieces = Sequence[tuple[Tensor, Tensor]]
"""(where to, where from), of equal shapes."""


def copy_to_host(tensors: Sequence[Tensor], *, huge_pages: bool = False) -> list[Tensor]:
    """Copies that no later change of the tensors reaches, each with a storage of its own.

    One mapping holds them all. When the last copy goes it is kept for the next save, and its memory
    is the system's to take: what costs is the first touch of a page. Several threads copy, on CUDA
    each over a stream of its own: one moves a fraction of what the bus can. Waits for the device.

    Args:
        huge_pages: Ask the system for them, in a mapping that is not kept. Where memory is
            fragmented it may take long to find them: a virtual machine took three times as long.
    """
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    room = max(sum(map(_aligned, sizes)), mmap.PAGESIZE)
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping = _map(room)
        mapping.madvise(mmap.MADV_HUGEPAGE)
        memory = memoryview(mapping)
    else:
        memory = _KEPT.take(room)
    copies, start = [], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        copies.append(_place(memory, start, size, tensor))
        start += _aligned(size)
    pieces = [piece for pair in zip(copies, tensors, strict=True) for piece in _pieces(*pair)]
    copy = _over_a_stream() if hardware.IS_CUDA else _copy
    count = threads_for_files()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(copy, [pieces[i::count] for i in range(count)]))
    return copies


def threads_for_files() -> int:
    """How many files a rank writes or reads at a time: its share of the cores, at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))
    return max(1, min(_THREADS, (os.cpu_count() or 1) // ranks))


class _Kept:
    """A mapping that is used by one save after another."""

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._is_free = True

    def take(self, size: int) -> memoryview:
        """Memory of ``size`` bytes; free again once the view and all tensors in it are gone."""
        if not self._is_free:  # an earlier save is still being written
            return memoryview(_map(size))
        if self._mapping is None or len(self._mapping) < size:
            self._mapping = None  # first: there may be no room for both
            self._mapping = _map(size)
        self._is_free = False
        view = memoryview(self._mapping)
        weakref.finalize(view, self._give_back, self._mapping).atexit = False
        return view

    def _give_back(self, mapping: mmap.mmap) -> None:
        # In the thread that let go of the last copy. In this order: pages that are written before
        # the call may be taken away after it.
        if hasattr(mmap, "MADV_FREE"):
            mapping.madvise(mmap.MADV_FREE)
        self._is_free = True


_KEPT = _Kept()


def _map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _place(memory: memoryview, start: int, size: int, like: Tensor) -> Tensor:
    if size == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=size)
    return flat.view(like.dtype).view(like.shape)


def _pieces(to: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if not source.is_contiguous():
        yield to, source
        return
    flat_to, flat = to.view(-1), source.detach().view(-1)
    step = max(1, _PIECE // to.element_size())
    for first in range(0, len(flat), step):
        yield flat_to[first : first + step], flat[first : first + step]


@torch.no_grad()  # of this thread
def _copy(pieces: Pieces) -> None:
    for to, source in pieces:
        to.copy_(source)


def _over_a_stream() -> Callable[[Pieces], None]:
    """``_copy`` for threads, behind what this thread has queued on the device."""
    device, current = hardware.device(), torch.cuda.current_stream()

    def copy(pieces: Pieces) -> None:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            # After what is queued: the update whose result is copied. A copy to memory that is
            # not pinned has arrived when it returns: with all threads in, the next step may write.
            torch.cuda.current_stream().wait_stream(current)
            _copy(pieces)

    return copy


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
