"""Pure layout transforms between HF tensors and a tensor-parallel rank's Megatron parameter.

``read`` takes anything sliceable (a tensor, or a safetensors slice, so that only the rank's bytes
are read from disk) and gives the rank's shard; ``write`` takes every rank's shard and gives the HF
tensors back, bitwise. Trailing dimensions are free: weights and biases use the same transform.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """Attention sizes of the whole model: query groups, and rows of one head."""

    groups: int
    head_dim: int


class Transform(Protocol):
    """How one Megatron parameter relates to its HF tensors."""

    def read(self, sources: Sequence[Any], tp_rank: int, tp_size: int, heads: Heads) -> Tensor:
        """Return this rank's shard."""
        ...

    def write(self, shards: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        """Return the HF tensors, from the shards of all tensor-parallel ranks in order."""
        ...


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every rank."""

    def read(self, sources: Sequence[Any], tp_rank: int, tp_size: int, heads: Heads) -> Tensor:
        del tp_rank, tp_size, heads
        return sources[0][:]

    def write(self, shards: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        del heads
        return [shards[0]]


@dataclass(frozen=True)
class Split:
    """Cut evenly along ``dim``: 0 for column-parallel, 1 for row-parallel."""

    dim: int

    def read(self, sources: Sequence[Any], tp_rank: int, tp_size: int, heads: Heads) -> Tensor:
        del heads
        size, rest = divmod(_shape(sources[0])[self.dim], tp_size)
        assert rest == 0, f"dimension {self.dim} of {_shape(sources[0])} is not split by {tp_size}"
        rows = slice(tp_rank * size, (tp_rank + 1) * size)
        return sources[0][rows] if self.dim == 0 else sources[0][:, rows]

    def write(self, shards: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        del heads
        return [_join(shards, self.dim)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows split evenly; where they do not divide, zero rows make up the last rank's share.

    ``write`` returns the padding with the rest: only the caller knows where the vocabulary ends.
    """

    def read(self, sources: Sequence[Any], tp_rank: int, tp_size: int, heads: Heads) -> Tensor:
        del heads
        share = -(-_shape(sources[0])[0] // tp_size)
        shard = sources[0][tp_rank * share : (tp_rank + 1) * share]
        missing = share - shard.shape[0]
        if missing == 0:
            return shard
        return torch.cat([shard, shard.new_zeros(missing, *shard.shape[1:])])

    def write(self, shards: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        del heads
        return [_join(shards, 0)]


@dataclass(frozen=True)
class GateUp:
    """linear_fc1 of a gated MLP: each rank holds [its gate rows; its up rows]."""

    def read(self, sources: Sequence[Any], tp_rank: int, tp_size: int, heads: Heads) -> Tensor:
        return torch.cat([Split(0).read([s], tp_rank, tp_size, heads) for s in sources])

    def write(self, shards: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        del heads
        halves = [shard.chunk(2) for shard in shards]
        return [_join([half[i] for half in halves], 0) for i in (0, 1)]


@dataclass(frozen=True)
class Qkv:
    """linear_qkv: per query group its query rows, then its key and value rows; split by group."""

    def read(self, sources: Sequence[Any], tp_rank: int, tp_size: int, heads: Heads) -> Tensor:
        mine, rest = divmod(heads.groups, tp_size)
        assert rest == 0, f"{heads.groups} query groups are not split by {tp_size}"
        parts = []
        for source in sources:
            part = Split(0).read([source], tp_rank, tp_size, heads)
            parts.append(part.unflatten(0, (mine, -1)))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def write(self, shards: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        whole = _join(shards, 0).unflatten(0, (heads.groups, -1))
        size = heads.head_dim
        q, k, v = whole[:, : -2 * size], whole[:, -2 * size : -size], whole[:, -size:]
        return [part.flatten(0, 1).contiguous() for part in (q, k, v)]


@dataclass(frozen=True)
class FusedGateUp:
    """As ``GateUp``, from one HF tensor that holds all gate rows, then all up rows."""

    def read(self, sources: Sequence[Any], tp_rank: int, tp_size: int, heads: Heads) -> Tensor:
        (whole,) = sources
        half = _shape(whole)[0] // 2
        halves = [_Part(whole, 0, half), _Part(whole, half, 2 * half)]
        return GateUp().read(halves, tp_rank, tp_size, heads)

    def write(self, shards: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        return [torch.cat(GateUp().write(shards, heads))]


@dataclass(frozen=True)
class FusedQkv:
    """As ``Qkv``, from one HF tensor that holds all query rows, then all keys, then all values."""

    def read(self, sources: Sequence[Any], tp_rank: int, tp_size: int, heads: Heads) -> Tensor:
        (whole,) = sources
        rows, kv = _shape(whole)[0], heads.groups * heads.head_dim
        ends = (0, rows - 2 * kv, rows - kv, rows)
        parts = [_Part(whole, start, end) for start, end in itertools.pairwise(ends)]
        return Qkv().read(parts, tp_rank, tp_size, heads)

    def write(self, shards: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        return [torch.cat(Qkv().write(shards, heads))]


class _Part:
    """Some rows of something sliceable, sliceable itself: still only what is asked for is read."""

    def __init__(self, source: Any, start: int, end: int) -> None:
        self._source, self._start = source, start
        self._length = end - start

    def get_shape(self) -> list[int]:
        return [self._length, *_shape(self._source)[1:]]

    def __getitem__(self, rows: slice) -> Tensor:
        start, end, _ = rows.indices(self._length)
        return self._source[self._start + start : self._start + end]


def _join(shards: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate; a single shard is the whole and is not copied."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


def _shape(source: Any) -> list[int]:
    return list(source.shape) if isinstance(source, Tensor) else source.get_shape()
