"""Gradient buffers and optimizer state in host memory while the policy generates."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_irl import hardware


@contextmanager
def offloaded(chunks: Sequence[Any], optimizer: Any) -> Iterator[None]:
    """Within the block the device holds neither gradients nor optimizer state.

    Storages are emptied and filled again in place, so every view of them stays valid: Megatron's
    buckets, the optimizer's shards, ``main_grad``. Parameters stay where they are, because CUDA
    graphs know them by address; so do optimizer parameters that are views of them (fp32).
    Optimizer state comes back bit for bit; gradients come back zero, as a step begins with them.

    Args:
        chunks: As trained. Without Megatron's DDP there are no buffers to empty.
        optimizer: Megatron's, chained or not.

    Collectives: none.
    """
    buffers = _grad_buffers(chunks)
    for buffer in buffers:
        buffer.offload_to_cpu(move_params=False, move_grads=True)
    # The buffers are empty by now: gradients that the optimizer knows are views of them, no state.
    kept = [(storage, _to_host(storage)) for storage in _state_storages(chunks, optimizer)]
    hardware.synchronize()  # the copies are made before their sources go
    for storage, _ in kept:
        storage.resize_(0)
    # The freed blocks are torch's still; the engine's cache is to be one piece of memory.
    hardware.release_cached_memory()
    try:
        yield
    finally:
        for storage, host in kept:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
        hardware.synchronize()  # and before the host's copies go
        for buffer in buffers:
            buffer.reload_from_cpu(move_params=False, move_grads=True)


def _grad_buffers(chunks: Sequence[Any]) -> list[Any]:
    found = []
    for chunk in chunks:
        for name in ("buffers", "expert_parallel_buffers"):
            buffers = vars(chunk).get(name)  # not nn.Module's method of this name
            found += buffers if isinstance(buffers, list) else []
    return found


def _state_storages(chunks: Sequence[Any], optimizer: Any) -> list[torch.UntypedStorage]:
    """What the optimizer holds on the device beside the model's own parameters, each once."""
    device = hardware.device().type
    taken = {
        p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()
    }
    taken |= {buffer.grad_data.untyped_storage().data_ptr() for buffer in _grad_buffers(chunks)}
    found = []
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(one, "optimizer", None)
        if inner is None:  # a rank without parameters of its kind has a stub
            continue
        tensors = [p for group in inner.param_groups for p in group["params"]]
        tensors += [p.grad for p in tensors if p.grad is not None]
        tensors += [v for state in inner.state.values() for v in state.values()]
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != device:
                continue
            # By storage: moments may be slices of one, and an fp32 "main" parameter is the model's.
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in taken:
                taken.add(storage.data_ptr())
                found.append(storage)
    return found


def _to_host(storage: torch.UntypedStorage) -> torch.Tensor:
    # Pinned: to other memory a copy makes the host wait, at a fraction of the bus's speed.
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=hardware.IS_CUDA)
    return host.copy_(_bytes(storage), non_blocking=True)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
