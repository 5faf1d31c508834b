"""A Megatron distributed checkpoint written group by group, without a model or a process group.

The format is torch's (``torch_dist`` in Megatron's words): data files of single tensors, and
``.metadata`` that says which piece of which global tensor is where. Pieces may be of any size, so
one process writes whole tensors and any layout reads its shards of them.
"""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_irl.convert.hf_config import Architecture
from megatron_irl.families.table import Row, row_groups, stored_name
from megatron_irl.storage.commit import write_file

COMMON = "common_state/shard_0_1"  # Megatron's place for what is no tensor
Read = Callable[[Row], Tensor]


class _Planner(DefaultSavePlanner):
    """Makes the tensors of one group when the writer asks for them."""

    def __init__(self, read: Read, rows: dict[MetadataIndex, Row], common: bytes) -> None:
        super().__init__()
        self._read, self._rows, self._common = read, rows, common

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._common)
        assert write_item.tensor_data is not None
        tensor = self._read(self._rows[write_item.index])
        return tensor.reshape(write_item.tensor_data.chunk.sizes)


class CheckpointWriter:
    """Writes ``folder``; each group is on the disk, and known to be, before the next one.

    Args:
        folder: An empty folder, or one that an interrupted writer with the same arguments left.
        dtype_of: dtype of a row's parameter.
    """

    def __init__(
        self, folder: Path, arch: Architecture, dtype_of: Callable[[Row], torch.dtype]
    ) -> None:
        self._folder, self._dtype_of = folder, dtype_of
        self._writer = FileSystemWriter(folder)
        self._arch = arch
        self.groups = list(row_groups(arch))
        items = [[self._item(row) for row in rows] for _, rows in self.groups]
        items[0].append(WriteItem(MetadataIndex(COMMON), WriteItemType.BYTE_IO))
        self._plans = self._writer.prepare_global_plan([SavePlan(group) for group in items])

    def is_written(self, group: int) -> bool:
        """Whether an earlier writer finished a group."""
        return self._journal(group).exists()

    def write(self, group: int, read: Read) -> None:
        """Write one group; ``read`` gives a row's whole tensor, one at a time."""
        plan, (_, rows) = self._plans[group], self.groups[group]
        by_index = {item.index: row for item, row in zip(plan.items, rows, strict=False)}
        common = io.BytesIO()
        torch.save([{"checkpoint_version": 3.0, "iteration": 0}], common)
        planner = _Planner(read, by_index, common.getvalue())
        results = self._writer.write_data(plan, planner).value()
        write_file(self._journal(group), pickle.dumps(results))

    def finish(self) -> None:
        """Write the metadata: with it the folder is a checkpoint."""
        journals = [self._journal(group) for group in range(len(self.groups))]
        results = [pickle.loads(journal.read_bytes()) for journal in journals]
        self._writer.finish(self._metadata(), results)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self._folder / "metadata.json").write_text(json.dumps(config))
        for journal in journals:
            journal.unlink()

    def _journal(self, group: int) -> Path:
        return self._folder / f".group_{group:05d}"

    def _item(self, row: Row) -> WriteItem:
        name, place = stored_name(row.megatron, self._arch)
        shape = row.shape(self._arch)
        offsets, sizes = (*place.values(), *(0,) * len(shape)), (*(1,) * len(place), *shape)
        whole = (*(self._arch.dims[stacked] for stacked in place), *shape)
        return WriteItem(
            MetadataIndex(name, torch.Size(offsets)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                properties=TensorProperties(dtype=self._dtype_of(row)),
                size=torch.Size(whole),
            ),
        )

    def _metadata(self) -> Metadata:
        entries: dict[str, Any] = {COMMON: BytesStorageMetadata()}
        for item in (item for plan in self._plans for item in plan.items):
            data = item.tensor_data
            if data is not None:
                entry = TensorStorageMetadata(data.properties, data.size, [])
                entries.setdefault(item.index.fqn, entry).chunks.append(data.chunk)
        return Metadata(entries)
