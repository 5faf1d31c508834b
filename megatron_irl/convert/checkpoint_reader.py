"""A Megatron distributed checkpoint read tensor by tensor, without a model or a process group.

What a run saved under any layout, or a converter wrote, is a set of global tensors; a piece of one
is assembled from however many pieces it was saved in.
"""

import dataclasses
import itertools
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_irl.convert.hf_config import Architecture
from megatron_irl.convert.safe_metadata import read_metadata
from megatron_irl.errors import UserError
from megatron_irl.families.table import (
    ADAPTER,
    EMBEDDING,
    HEAD,
    REWARD_ROW,
    Row,
    rows,
    spellings,
    stored_name,
)

Pieces = list[ChunkStorageMetadata]
PREFIXES = ("", "module.")  # bare, and as saved from inside the data-parallel wrapper
FINAL_NORM = "decoder.final_layernorm.weight"


class CheckpointReader:
    """The model's tensors in a checkpoint; optimizer state and the like are not touched.

    Attributes:
        prefix: What the model's tensor names begin with.

    Raises:
        UserError: It cannot be read, or holds no GPTModel.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._reader = FileSystemReader(checkpoint)
        metadata = read_metadata(checkpoint)  # not the reader's own way, which unpickles anything
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._entries: dict[str, Any] = metadata.state_dict_metadata
        self._pieces: dict[str, dict[tuple[int, ...], Pieces]] = {}
        self.prefix = self._find_prefix()

    def stored_as(self, name: str) -> str:
        """The checkpoint's spelling of a tensor: norms may be fused with a linear layer or not."""
        return next((n for n in spellings(name) if n in self._entries), name)

    @property
    def holds_adapters(self) -> bool:
        """Whether a run with adapters saved it: they are there, and their base is not."""
        return any(f".{ADAPTER}." in name for name in self._entries)

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has an entry of exactly this name."""
        return name in self._entries

    def check(self, arch: Architecture) -> None:
        """Raise UserError unless every tensor of the architecture is there in its shape."""
        if self.holds_adapters:
            raise UserError(
                f"the checkpoint {self.checkpoint} holds adapters, and not the model below them. "
                "tools/convert_megatron_to_hf.py merges them, without --reward; or give the run's "
                "hf/ folder, where they are, or adapter/ with its base."
            )
        for row in rows(arch):
            name, place = self._locate(row, arch)
            have, shape = list(self._entries[name].size), list(row.shape(arch))
            expected = [*(arch.dims[stacked] for stacked in place), *shape]
            # A vocabulary may have been padded for the layout that saved it.
            padded = row.megatron in (EMBEDDING, HEAD) and have[1:] == shape[1:]
            if have != expected and not (padded and have[0] > shape[0]):
                stacks = " of ".join(f"{arch.dims[n]} {n}" for n in reversed(place))
                raise UserError(
                    f"the checkpoint {self.checkpoint} is of another model: {row.megatron} has "
                    f"shape {have} there, config.json implies {shape}"
                    f"{f' in {stacks}' if place else ''}."
                )

    def dtype_of(self, row: Row, arch: Architecture) -> torch.dtype:
        """The dtype a row is stored in."""
        return self._entries[self._locate(row, arch)[0]].properties.dtype

    def read(self, row: Row, arch: Architecture) -> Tensor:
        """A row's whole parameter, as on one tensor-parallel rank.

        Raises:
            UserError: Its file is missing or damaged.
        """
        name, place = self._locate(row, arch)
        shape = row.shape(arch)
        chunk = ChunkStorageMetadata(
            offsets=torch.Size((*place.values(), *(0,) * len(shape))),
            sizes=torch.Size((*(1,) * len(place), *shape)),
        )
        target = torch.empty(tuple(chunk.sizes), dtype=self._entries[name].properties.dtype)
        near = dataclasses.replace(
            self._entries[name], chunks=self._pieces_at(name, tuple(place.values()))
        )
        items = create_read_items_for_chunk_list(name, near, [chunk])
        if sum(torch.Size(item.lengths).numel() for item in items) != target.numel():
            raise UserError(f"the checkpoint {self.checkpoint} holds only a part of {name}.")
        try:
            self._reader.read_data(LoadPlan(items), _Planner(target))
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError,
                AssertionError) as error:
            files = {self._reader.storage_data[i.storage_index].relative_path for i in items}
            raise UserError(
                f"the checkpoint {self.checkpoint} is damaged: {name} cannot be read from "
                f"{', '.join(sorted(files))} ({first_line(error)})."
            ) from error
        return target.view(shape)

    def _find_prefix(self) -> str:
        for prefix in PREFIXES:
            if isinstance(self._entries.get(prefix + FINAL_NORM), TensorStorageMetadata):
                return prefix
        if self.holds_adapters:
            return ""
        raise UserError(f"the checkpoint {self.checkpoint} does not hold a GPTModel's weights.")

    def _pieces_at(self, name: str, place: tuple[int, ...]) -> Pieces:
        """The pieces of a tensor at a place in its first dimensions.

        Torch looks at every piece that it is given, and a mixture has thousands of them.
        """
        if name not in self._pieces:
            by_place: dict[tuple[int, ...], Pieces] = defaultdict(list)
            for piece in self._entries[name].chunks:
                spans = zip(piece.offsets, piece.sizes, strict=True)
                ranges = [range(start, start + size) for start, size in spans][: len(place)]
                for reached in itertools.product(*ranges):
                    by_place[reached].append(piece)
            self._pieces[name] = dict(by_place)
        return self._pieces[name].get(place, [])

    def _locate(self, row: Row, arch: Architecture) -> tuple[str, dict[str, int]]:
        """Where a row is: (name, place), norms being fused or not and layers stacked or not."""
        stored, place = stored_name(row.megatron, arch)
        names = list(spellings(stored))
        if place:
            numbered = f"layers.{place['layers']}."
            names += [name.replace("layers.", numbered, 1) for name in names]
        for name in (self.prefix + name for name in names):
            if isinstance(self._entries.get(name), TensorStorageMetadata):
                stacked = len(self._entries[name].size) - len(row.shape(arch))
                return name, dict(list(place.items())[max(0, len(place) - stacked) :])
        if row is REWARD_ROW:
            raise UserError(
                f"the checkpoint {self.checkpoint} holds no reward head. Only runs with "
                "algorithm.name=rft learn one; without --reward the language model is written."
            )
        raise UserError(
            f"the checkpoint {self.checkpoint} lacks {row.megatron}, which config.json implies."
        )


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class _Planner(DefaultLoadPlanner):
    """Everything read goes into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
