"""Reductions of metrics and objects between the ranks of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_irl.parallel.topology import Topology
from megatron_irl.types import Metric


def merge_metrics(parts: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """Add up the metrics of several microbatches of one rank, each by its declared reduction."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            if name not in merged:
                merged[name] = metric
                continue
            old = merged[name]
            if metric.reduction == "max":
                total = torch.maximum(torch.as_tensor(old.total), torch.as_tensor(metric.total))
            else:
                total = old.total + metric.total
            merged[name] = Metric(total, old.weight + metric.weight, metric.reduction)
    return merged


def reduce_metrics(
    parts: Sequence[dict[str, Metric]], topology: Topology, device: torch.device
) -> dict[str, float]:
    """Reduce per-microbatch metrics of the last stages to plain numbers on every rank.

    Two all-reduces (sums, maxima) over data parallelism on the last stage, then one broadcast
    along the pipeline; ``max`` is never averaged and a mean is the global sum over the global
    weight, so neither microbatching nor data parallelism changes a number.

    Args:
        parts: What the last pipeline stage collected; empty elsewhere.

    Collectives: every rank of the run must call.
    """
    values: dict[str, float] = {}
    if topology.is_last_stage:
        merged = merge_metrics(parts)
        # Added up by position: every replica has run the same objective on at least one microbatch,
        # so the names and their order are the same. An objective that reports a metric only
        # sometimes would mix metrics up between replicas.
        means = [n for n in merged if merged[n].reduction == "mean"]
        maxima = [n for n in merged if merged[n].reduction == "max"]
        pairs = [number for n in means for number in (merged[n].total, merged[n].weight)]
        sums = _as_float64(pairs, device).reshape(-1, 2)
        tops = _as_float64([merged[n].total for n in maxima], device)
        # Tensor-parallel ranks hold equal metrics; each reduces with its own peers of other
        # replicas, to the same. The other stages have nothing, and get the result below.
        dist.all_reduce(sums, group=topology.dp_group)
        dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=topology.dp_group)
        # The step's one wait for the device before the update.
        numbers = torch.cat([sums.flatten(), tops]).tolist()
        for i, name in enumerate(means):
            total, weight = numbers[2 * i : 2 * i + 2]
            values[name] = total / weight if weight else 0.0
        values.update(zip(maxima, numbers[2 * len(means) :], strict=True))
    return from_last_stage(values, topology)


def _as_float64(numbers: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """Numbers as one float64 tensor, those on the device without a transfer to the host each."""
    if not numbers:
        return torch.empty(0, dtype=torch.float64, device=device)
    scalars = [torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers]
    return torch.stack([scalar.reshape(()) for scalar in scalars])


def from_last_stage(value: Any, topology: Topology) -> Any:
    """Broadcast a small picklable object from the last pipeline stage. Collective over pp."""
    if topology.pp_size == 1:
        return value
    box = [value]
    # ``src`` counts ranks of the run, not of the group. (Pickling moves the value over the host.)
    last = dist.get_global_rank(topology.pp_group, topology.pp_size - 1)
    dist.broadcast_object_list(box, src=last, group=topology.pp_group)
    return box[0]


def from_main(value: Any, topology: Topology) -> Any:
    """Broadcast a small picklable object from rank 0 to every rank. Collective over the world."""
    if topology.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_over_data_parallel(value: Any, topology: Topology) -> list[Any]:
    """Return every data-parallel rank's object, in rank order. Collective over dp."""
    if topology.dp_size == 1:
        return [value]
    box: list[Any] = [None] * topology.dp_size
    dist.all_gather_object(box, value, group=topology.dp_group)
    return box


def largest_over_world(numbers: Mapping[str, float], topology: Topology) -> dict[str, float]:
    """Of each number the largest that any rank brings: peaks of memory, seconds that all wait for.

    A name may be missing on some ranks. Collective over the world.
    """
    if topology.world_size == 1:
        return dict(numbers)
    box: list[Mapping[str, float]] = [{}] * topology.world_size
    dist.all_gather_object(box, dict(numbers))
    names = dict.fromkeys(name for each in box for name in each)
    return {name: max(each[name] for each in box if name in each) for name in names}


def gather_in_turn(mine: Sequence[Any], topology: Topology) -> list[Any]:
    """All items in order, where rank r holds items r, r + dp_size, ...  Collective over dp."""
    by_rank = gather_over_data_parallel(mine, topology)
    size = topology.dp_size
    # Dealt in turn, rank 0 has at most one item more than the last, so item i is always there.
    return [by_rank[i % size][i // size] for i in range(sum(map(len, by_rank)))]
