"""Safetensors files written tensor by tensor: names, shapes and dtypes are known beforehand.

The header comes first in a file, so with the sizes known every tensor has its place before the
first one is there. Memory stays at one tensor however large the files are.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_irl.convert.hf_folder import INDEX, SINGLE

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardedWriter:
    """A folder of safetensors files, and their index if there are several.

    Args:
        folder: Exists.
        plan: Every tensor, in the order of the files.
        max_shard_bytes: A new file is begun when the next tensor would exceed this.
        resume: The files are there from an earlier writer with the same plan; tensors added to
            that one need not be added again.
    """

    def __init__(
        self, folder: Path, plan: list[TensorPlan], max_shard_bytes: int, *, resume: bool = False
    ) -> None:
        self.folder = folder
        self.total_bytes = sum(tensor.nbytes for tensor in plan)
        self._places: dict[str, tuple[str, int, TensorPlan]] = {}
        shards = _split(plan, max_shard_bytes)
        for number, shard in enumerate(shards):
            file = SINGLE
            if len(shards) > 1:
                file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            self._begin(file, shard, resume)
        if len(shards) > 1:
            weight_map = {t.name: self._places[t.name][0] for t in plan}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2))
        self._file: tuple[str, BinaryIO] | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor (CPU) to its place, cast to its planned dtype."""
        file, offset, plan = self._places[name]
        assert tuple(tensor.shape) == plan.shape, f"{name}: {tensor.shape}, planned {plan.shape}"
        stream = self._stream(file)
        stream.seek(offset)
        data = tensor.detach().to(plan.dtype).contiguous()
        stream.write(memoryview(data.flatten().view(torch.uint8).numpy()))

    def flush(self) -> None:
        """Put what was added on the disk."""
        if self._file is not None:
            self._file[1].flush()
            os.fsync(self._file[1].fileno())

    def close(self) -> None:
        """Close the file in hand."""
        if self._file is not None:
            self.flush()
            self._file[1].close()
            self._file = None

    def _begin(self, file: str, shard: list[TensorPlan], resume: bool) -> None:
        # Wide dtypes first, so that every tensor is aligned to its own.
        ordered = sorted(shard, key=lambda t: -t.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in ordered:
            header[tensor.name] = {
                "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for tensor in ordered:
            entry = header[tensor.name]
            assert isinstance(entry, dict)
            self._places[tensor.name] = (file, start + entry["data_offsets"][0], tensor)
        if not resume:
            with open(self.folder / file, "wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                stream.truncate(start + end)

    def _stream(self, file: str) -> BinaryIO:
        if self._file is None or self._file[0] != file:
            self.close()
            self._file = (file, open(self.folder / file, "r+b"))
        return self._file[1]


def _split(plan: list[TensorPlan], max_bytes: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards
