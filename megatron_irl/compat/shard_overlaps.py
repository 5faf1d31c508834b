"""torch's check that no two shards of a tensor overlap, in a time that experts allow.

Whenever a tensor is saved or loaded, torch 2.14 compares each of its shards with all that share
its range of the longest dimension. Megatron makes one tensor of the experts of all layers, a shard
for each: of 128 experts in 48 layers that is 19 million comparisons. Shards that are one thick in a
dimension, as experts are in two, only overlap where they are at the same place in it; so torch is
asked about those of one place at a time.

To be removed when torch or Megatron looks at no more shards than these.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import _internals

Pair = tuple[int, int]
ask_torch = _internals._find_nd_overlapping_shards


@contextmanager
def compared_by_place() -> Iterator[None]:
    """Within the block shards are compared as this module does."""
    original = _internals._find_nd_overlapping_shards
    _internals._find_nd_overlapping_shards = overlapping
    try:
        yield
    finally:
        _internals._find_nd_overlapping_shards = original


def overlapping(shards: list[ShardMetadata], sharded_dims: list[int]) -> Pair | None:
    """Two shards that overlap, by their numbers; None: no two do.

    Args:
        sharded_dims: Those in which not all shards are alike.
    """
    thin = [dim for dim in sharded_dims if all(shard.shard_sizes[dim] == 1 for shard in shards)]
    rest = [dim for dim in sharded_dims if dim not in thin]
    at_place: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, shard in enumerate(shards):
        at_place[tuple(shard.shard_offsets[dim] for dim in thin)].append(number)
    for numbers in at_place.values():
        if len(numbers) == 1:
            continue
        if not rest:
            return numbers[0], numbers[1]
        if (pair := ask_torch([shards[number] for number in numbers], rest)) is not None:
            return numbers[pair[0]], numbers[pair[1]]
    return None
