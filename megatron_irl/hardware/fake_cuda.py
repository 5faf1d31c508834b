"""What ``megatron.core`` sees in place of ``torch.cuda`` on a machine without a GPU.

Streams and events are no-ops because CPU work is synchronous; memory figures come from the
process; random state is the CPU generator's. Only names that Megatron-Core uses are here.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import BFloat16Tensor, FloatTensor, HalfTensor  # noqa: F401  (type names upstream)


def current_device() -> torch.device:
    return torch.device("cpu")


def is_available() -> bool:
    # Upstream asks before it uses what stands in here, and refuses to go on without.
    return True


def is_initialized() -> bool:
    return True


def is_current_stream_capturing() -> bool:
    return False


def device_count() -> int:
    # A rank has its process's memory to itself; what several share is not modelled.
    return 1


def set_device(device: Any) -> None:
    del device


def synchronize(device: Any = None) -> None:
    del device


def empty_cache() -> None:
    pass


def get_device_capability(device: Any = None) -> tuple[int, int]:
    # Older than every architecture that upstream has a special kernel for.
    del device
    return (0, 0)


def get_device_properties(device: Any = None) -> SimpleNamespace:
    del device
    memory = psutil.virtual_memory().total
    return SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=memory, multi_processor_count=os.cpu_count()
    )


def get_device_name(device: Any = None) -> str:
    del device
    return "cpu"


def get_rng_state(device: Any = None) -> torch.Tensor:
    del device
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    del device
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


manual_seed_all = manual_seed
initial_seed = torch.initial_seed
random = SimpleNamespace(
    get_rng_state=get_rng_state, set_rng_state=set_rng_state, manual_seed=manual_seed
)


class _Generators:
    """Upstream indexes by ``current_device()``, which is not a number here."""

    def __getitem__(self, device: Any) -> torch.Generator:
        del device
        return torch.default_generator


default_generators = _Generators()


def _lazy_init() -> None:
    pass


def _lazy_call(callable: Any, **_: Any) -> None:
    # At once: the real one keeps the call until CUDA has started.
    callable()


class Stream:
    """A stream that is always idle. All are the same one: upstream asks before it marks a tensor
    as used by another stream, which torch refuses without a GPU.
    """

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        del device, priority

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Any) -> None:
        del stream

    def wait_event(self, event: Any) -> None:
        del event

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Event:
    """An event that has happened as soon as it is recorded."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        del enable_timing
        self._seconds = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        del stream
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        del stream

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return (end._seconds - self._seconds) * 1e3


_STREAM = Stream()


def current_stream(device: Any = None) -> Stream:
    del device
    return _STREAM


default_stream = current_stream


@contextlib.contextmanager
def stream(chosen: Any = None) -> Iterator[None]:
    del chosen
    yield


@contextlib.contextmanager
def device(chosen: Any = None) -> Iterator[None]:
    del chosen
    yield


def set_stream(chosen: Any) -> None:
    del chosen


def memory_allocated(device: Any = None) -> int:
    del device
    return psutil.Process().memory_info().rss


memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated


def memory_stats(device: Any = None) -> dict[str, int]:
    used = memory_allocated(device)
    return {
        "allocated_bytes.all.current": used,
        "allocated_bytes.all.peak": used,
        "reserved_bytes.all.current": used,
        "reserved_bytes.all.peak": used,
    }


def memory_snapshot() -> list[Any]:
    return []


def reset_peak_memory_stats(device: Any = None) -> None:
    del device


def mem_get_info(device: Any = None) -> tuple[int, int]:
    del device
    memory = psutil.virtual_memory()
    return memory.available, memory.total


nvtx = SimpleNamespace(
    range_push=lambda *_: 0, range_pop=lambda *_: 0, range=lambda *_: contextlib.nullcontext()
)
amp = SimpleNamespace(
    custom_fwd=lambda *a, **_: a[0] if a else (lambda f: f),
    custom_bwd=lambda *a, **_: a[0] if a else (lambda f: f),
)


class CUDAGraph:
    """Present for annotations; capturing is refused."""

    def __init__(self) -> None:
        raise RuntimeError("CUDA graphs need a GPU; set the graph options off on CPU.")
