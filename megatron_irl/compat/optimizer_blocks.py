"""Megatron's distributed optimizer saved by every rank for itself, in a form any layout reads.

Of Megatron-Core 0.19's two formats ``dp_reshardable`` cannot be read under another tensor or
pipeline layout, and ``fully_reshardable`` gathers the whole state over data parallelism: on one
rank, or on every one. Neither is needed. A rank owns a range of each parameter's elements, and a
range of a row-major tensor is a few boxes: the rest of a row, whole rows, the beginning of a row.
torch's checkpoints hold tensors as any boxes that fill them. So every rank writes its boxes of the
tensors that ``fully_reshardable`` would write, under the same names, and reads just its own;
nothing is exchanged, and Megatron reads what is written here as what it would have written.

To be removed when ``DistributedOptimizer`` has a format that does both.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.compat.narrow_optimizer import keeps_few_bytes, states_in_place, stored_states

from megatron.core.dist_checkpointing.dict_utils import nested_values  # isort: skip
from megatron.core.dist_checkpointing.mapping import (  # isort: skip
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import (  # isort: skip
    extract_sharded_tensors_and_factories,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # isort: skip

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, shape) by dimension."""


@contextmanager
def in_blocks(optimizer: Any) -> Iterator[None]:
    """Within the block ``fully_reshardable`` is made of every rank's own boxes.

    Args:
        optimizer: Megatron's, or None. Parts that are not distributed are left as they are.
    """
    parts: list[Any] = [
        part for part in getattr(optimizer, "chained_optimizers", [optimizer])
        if isinstance(part, DistributedOptimizer)
    ]
    for part in parts:
        part.sharded_param_state_fully_reshardable = partial(sharded_blocks, part)
        part.load_parameter_state_from_fully_reshardable = partial(load_blocks, part)
    try:
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(states_in_place(part.optimizer))
            yield
    finally:
        for part in parts:
            del part.sharded_param_state_fully_reshardable
            del part.load_parameter_state_from_fully_reshardable


def sharded_blocks(
    part: Any, model: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> dict[str, Any]:
    """What this rank owns of the optimizer's state, by parameter, name of the state and box.

    The tensors are views of the optimizer's, but for numbers with a scale; loading fills them in
    place.
    """
    del is_loading, metadata
    kept, _ = extract_sharded_tensors_and_factories(model)
    # By identity, as tensors hash: the optimizer's parameters are the very ones of the model.
    entry_of = {entry.data: entry for entry in nested_values(kept)}
    return {
        str(number): {
            name: {
                str(i): block for i, block in enumerate(
                    _blocks(entry_of[parameter], name, tensor, owned.start, part)
                )
            }
            for name, tensor in _state_of(part, parameter).items()
        }
        for number, (parameter, owned) in enumerate(_owned(part))
    }


@torch.no_grad()
def load_blocks(part: Any, loaded: dict[str, Any]) -> None:
    """Put what was read as ``sharded_blocks`` asked into the optimizer."""
    for number, (parameter, _) in enumerate(_owned(part)):
        # Copies of numbers with a scale, hence the last line; what is in 16 bits is itself.
        state = _state_of(part, parameter)
        for name, blocks in loaded[str(number)].items():
            start = 0
            for i in range(len(blocks)):
                values = blocks[str(i)].reshape(-1)
                state[name][start : start + len(values)].copy_(values)
                start += len(values)
            assert start == state[name].numel(), f"{name}: {start} of {state[name].numel()} read"
        part._set_main_param_and_optimizer_states(parameter, {
            name: values for name, values in state.items() if values.dtype == torch.float32
        })
    if hasattr(part.optimizer, "_sync_hdo_state_to_sub_optimizers"):
        part.optimizer._sync_hdo_state_to_sub_optimizers()


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements ``start`` to ``stop`` of a row-major tensor as boxes, in their order.

    At most two for each dimension but one more in all: three of a matrix, one of a vector.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = shape[1:]
    row = math.prod(inner)
    head = min(stop, -(-start // row) * row)  # where the row that ``start`` is inside of ends
    yield from _in_row(start // row, inner, start, head)
    first, last = -(-start // row), stop // row
    if first < last:
        yield (first, *(0,) * len(inner)), (last - first, *inner)
    yield from _in_row(last, inner, max(head, last * row), stop)


def _in_row(number: int, inner: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    before = number * math.prod(inner)
    for offset, shape in boxes(inner, start - before, stop - before):
        yield (number, *offset), (1, *shape)


def _owned(part: Any) -> Iterator[tuple[Any, Any]]:
    """(parameter, range of its elements) of all that this rank updates, in a fixed order."""
    for by_type in part.gbuf_ranges:
        for buckets in by_type.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"]


def _state_of(part: Any, parameter: Any) -> dict[str, Tensor]:
    """Main parameter and moments of a parameter's range as flat tensors, as they are stored."""
    inner = part.optimizer
    if keeps_few_bytes(inner):
        group, place = part.model_param_group_index_map[parameter]
        return stored_states(inner, inner.param_groups[group]["params"][place])
    states = part._get_main_param_and_optimizer_states(parameter)
    # Torch's Adam has a step for each, which is kept in the parameter groups.
    return {name: tensor.detach().float() for name, tensor in states.items() if name != "step"}


def _blocks(
    entry: Any, name: str, tensor: Tensor, start: int, part: Any
) -> Iterator[ShardedTensor]:
    """A rank's range of one state as boxes of the tensor that the checkpoint has.

    Args:
        entry: How the model's own parameter is stored.
        tensor: Flat, the elements of the parameter from ``start`` on.
    """
    stop = start + tensor.numel()
    taken = 0
    for piece in _pieces(entry, f"optimizer.state.{name}.{entry.key}"):
        begins = piece.data.storage_offset()
        low, high = max(start, begins), min(stop, begins + piece.data.numel())
        lead = piece.prepend_axis_num
        for offset, shape in boxes(piece.local_shape, low - begins, high - begins):
            size, shape = math.prod(shape), (1,) * lead + shape
            yield replace(
                piece, data=tensor[taken : taken + size].view(shape), dtype=tensor.dtype,
                local_shape=shape, prepend_axis_num=0, axis_fragmentations=None,
                global_offset=tuple(map(sum, zip(
                    piece.global_offset, (0,) * lead + offset, strict=True
                ))),
                # Data parallelism holds no second copy of it.
                replica_id=(*entry.replica_id[:2], part.distributed_optimizer_instance_id),
            )
            taken += size
    assert taken == tensor.numel(), f"{entry.key}: {taken} of {tensor.numel()} elements placed"


def _pieces(entry: Any, key: str) -> list[Any]:
    """The tensors of the checkpoint that a parameter is stored as, over it one after another.

    Their data has a place in the parameter (``storage_offset``) and no memory. A gated MLP's
    first layer is two, since tensor parallelism splits gate and value each.
    """
    place = torch.empty(entry.data.shape, dtype=torch.float32, device="meta")
    if isinstance(entry, ShardedTensorFactory):
        pieces: list[Any] = list(nested_values(replace(entry, key=key, data=place).build()))
    else:
        pieces = [replace(entry, key=key, data=place, dtype=place.dtype)]
    assert all(piece.data.is_contiguous() for piece in pieces), f"{entry.key} is not made of rows"
    return sorted(pieces, key=lambda piece: piece.data.storage_offset())
