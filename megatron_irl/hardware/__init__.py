"""The one door to the hardware: importing this package makes ``megatron.core`` importable here.

With CUDA present nothing is touched. Without it, the CPU retarget is installed, so this package
must be imported before the first ``megatron.core`` import (every room above does so).
``MEGATRON_IRL_PLATFORM=cpu`` forces the CPU on a machine with a GPU.
"""

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_irl.errors import UserError
from megatron_irl.hardware import host_memory
from megatron_irl.hardware.quiet import silence

IS_CUDA: bool = torch.cuda.is_available() and os.environ.get("MEGATRON_IRL_PLATFORM") != "cpu"
BACKEND: str = "nccl" if IS_CUDA else "gloo"

if not IS_CUDA:
    from megatron_irl.hardware import retarget

    retarget.install()

silence(is_cuda=IS_CUDA)


def device() -> torch.device:
    """The device of this process: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if IS_CUDA else torch.device("cpu")


def select_device(local_rank: int) -> None:
    """Bind this process to its accelerator; nothing to do on CPU.

    Raises:
        UserError: There is no accelerator for this rank.
    """
    if not IS_CUDA:
        return
    if local_rank >= device_count():
        raise UserError(
            f"LOCAL_RANK={local_rank} conflicts with the {device_count()} GPU(s) that this rank "
            "sees; each rank of a machine needs one. Lower parallel.data_parallel_size or another "
            "parallel size, show every rank all GPUs (CUDA_VISIBLE_DEVICES), or set "
            "MEGATRON_IRL_PLATFORM=cpu."
        )
    torch.cuda.set_device(local_rank)


def device_count() -> int:
    """How many ranks this machine has room for: its GPUs, or on CPU its cores."""
    return torch.cuda.device_count() if IS_CUDA else os.cpu_count() or 1


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned on CUDA so that it comes back at the bus's speed."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=IS_CUDA)
    return host.copy_(tensor.detach())  # waits for the device


def keep_float32() -> None:
    """Let fp32 products be fp32; NVIDIA's image rounds their factors to TF32 by an environment."""
    if IS_CUDA:
        torch.set_float32_matmul_precision("highest")


def synchronize() -> None:
    """Wait for queued device work, before reading a host clock."""
    if IS_CUDA:
        torch.cuda.synchronize()


def release_cached_memory() -> None:
    """Give cached device blocks back, so that the next phase can use them."""
    if IS_CUDA:
        torch.cuda.empty_cache()


def total_memory() -> int:
    """Bytes of the device's memory; 0 on CPU."""
    return torch.cuda.mem_get_info()[1] if IS_CUDA else 0


def free_memory() -> int:
    """Bytes that this process can still take: of its device, on CPU a share of the host's."""
    if IS_CUDA:
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))
    return host_memory.free() // ranks


def foreign_memory() -> int:
    """Bytes of the device that are neither free nor this process's tensors; 0 on CPU."""
    if not IS_CUDA:
        return 0
    # What this process's CUDA context and NCCL's buffers take counts as foreign: it is there
    # whatever the phase.
    free, total = torch.cuda.mem_get_info()
    return max(0, total - free - torch.cuda.memory_reserved())


def held_memory() -> int:
    """Bytes of device memory that tensors of this process take; 0 on CPU."""
    return torch.cuda.memory_allocated() if IS_CUDA else 0


def peak_memory() -> int:
    """Most bytes that tensors took at once since ``reset_peak_memory``; 0 on CPU."""
    return torch.cuda.max_memory_allocated() if IS_CUDA else 0


def peak_reserved_memory() -> int:
    """Most bytes that torch's allocator held at once since ``reset_peak_memory``; 0 on CPU."""
    return torch.cuda.max_memory_reserved() if IS_CUDA else 0


def device_memory(local_rank: int = 0, ranks: int = 1) -> int:
    """Bytes of a rank's device, before one is selected; on CPU a rank's share of the host's memory.

    Args:
        ranks: Of this machine.
    """
    if IS_CUDA:
        return torch.cuda.get_device_properties(local_rank).total_memory
    return host_memory.total() // ranks


def device_name() -> str:
    """What the driver calls the device; empty on CPU."""
    return torch.cuda.get_device_name() if IS_CUDA else ""


def peak_process_memory() -> int:
    """Most bytes of host memory that this process has had, since ``reset_peak_process_memory``."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def process_memory() -> int:
    """Bytes of host memory that this process has now."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def reset_peak_process_memory() -> None:
    """Begin a new phase, whose ``peak_process_memory`` is its own; what is freed is given back.

    Without effect where the kernel has no such switch. It resets what a parent process is told of
    this one too, so a run does not do it, only a benchmark.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def reset_peak_memory() -> None:
    """Start a new phase, whose ``peak_memory`` is its own."""
    if IS_CUDA:
        torch.cuda.reset_peak_memory_stats()


def library_versions() -> dict[str, str]:
    """Versions of cuDNN and NCCL as torch has loaded them; none on CPU."""
    if not IS_CUDA:
        return {}
    found = {}
    if number := torch.backends.cudnn.version():
        # 91900 is 9.19.0; before 9 the major counted thousands.
        major, rest = divmod(number, 10_000) if number >= 90_000 else divmod(number, 1000)
        found["cuDNN"] = f"{major}.{rest // 100}.{rest % 100}"
    if torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def compiled[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Fuse a function of elementwise operations and row reductions into few kernels on CUDA.

    Compiled at its first call, for any number of rows. On CPU the function itself: there, passes
    over memory are not what costs, and results stay bitwise those of the plain operations.
    """
    return torch.compile(function, dynamic=True) if IS_CUDA else function


def get_rng_state() -> torch.Tensor | None:
    """Random state of the device's generator; None on CPU, whose generator is torch's own."""
    return torch.cuda.get_rng_state() if IS_CUDA else None


def set_rng_state(state: torch.Tensor | None) -> None:
    """Restore what ``get_rng_state`` gave; a state of the other kind of machine is left alone."""
    if state is not None and IS_CUDA:
        torch.cuda.set_rng_state(state)


def has_fast_bf16() -> bool:
    """Whether bf16 matrix products run faster than fp32 ones on this device."""
    if IS_CUDA:
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
