"""Items of a global batch to microbatches of about equally many tokens."""

import heapq
import math
from collections.abc import Sequence


def assign(lengths: Sequence[int], num_bins: int, per_bin: int) -> list[list[int]]:
    """Split the items of a global batch into equally many per microbatch, equally long.

    Greedy: the longest item left goes to the microbatch that has the fewest tokens so far and
    still has room. Deterministic, so every rank computes the same split.

    Args:
        lengths: Tokens of each item; a pair counts prompt, demonstration and sample.
        num_bins: Microbatches, over all data-parallel ranks.
        per_bin: Items in each of them.

    Returns:
        [num_bins][per_bin] positions in ``lengths``, ascending within each microbatch.

    Raises:
        ValueError: There are not num_bins * per_bin items.
    """
    if len(lengths) != num_bins * per_bin:
        raise ValueError(f"{len(lengths)} items do not fill num_bins={num_bins} microbatches "
                         f"of per_bin={per_bin}")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [(0, index) for index in range(num_bins)]  # a heap of (tokens, bin)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, index = heapq.heappop(room)
        bins[index].append(item)
        if len(bins[index]) < per_bin:
            heapq.heappush(room, (tokens + int(lengths[item]), index))
    return [sorted(items) for items in bins]


def assign_by_tokens(
    lengths: Sequence[int], max_tokens: int, num_bins_multiple_of: int
) -> list[list[int]]:
    """Split the items of a global batch into few microbatches of about equally many tokens.

    As few as hold at most ``max_tokens`` each, where the greedy split finds them: the longest item
    left goes to the microbatch that has the fewest tokens so far. Deterministic, so every rank
    computes the same split.

    Args:
        lengths: Tokens of each item, all positive.
        max_tokens: Of a microbatch; an item that is longer has one of its own.
        num_bins_multiple_of: The number of microbatches, over all data-parallel ranks, is a
            multiple of this.

    Returns:
        [microbatches][items] positions in ``lengths``, ascending within each, none empty.

    Raises:
        ValueError: The items are no multiple of ``num_bins_multiple_of``.
    """
    unit = num_bins_multiple_of
    if not len(lengths) or len(lengths) % unit:
        raise ValueError(f"{len(lengths)} items are no multiple of {unit}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    least = math.ceil(math.ceil(int(sum(lengths)) / max_tokens) / unit) * unit
    bins: list[list[int]] = []
    # With as many bins as items each item has its own, so the search ends well.
    for count in range(min(least, len(lengths)), len(lengths) + 1, unit):
        bins = [[] for _ in range(count)]
        room = [(0, index) for index in range(count)]  # a heap of (tokens, bin)
        for item in order:
            tokens, index = heapq.heappop(room)
            bins[index].append(item)
            heapq.heappush(room, (tokens + int(lengths[item]), index))
        if all(tokens <= max_tokens or len(bins[index]) == 1 for tokens, index in room):
            break
    return [sorted(items) for items in bins]
