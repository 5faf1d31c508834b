"""Megatron chunks → an ordinary HF folder, one tensor at a time."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_irl.convert.companions import copy_companions, write_config, write_stop_ids
from megatron_irl.convert.hf_config import Architecture
from megatron_irl.convert.load import global_parameters
from megatron_irl.convert.safetensors_writer import ShardedWriter, TensorPlan
from megatron_irl.errors import UserError
from megatron_irl.families.table import Row, hf_tensors, rows
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.storage.commit import replacing_folder


def export_hf(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    hf_config: dict[str, Any],
    out_dir: Path,
    *,
    source_dir: Path,
    topology: Topology,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer_path: Path | None = None,
    chat_template: str | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Write weights, config, tokenizer and chat template; the folder appears whole or not at all.

    Each tensor is gathered over its stage's tensor-parallel ranks and sent to rank 0, which holds
    one at a time. An ``out_dir`` that exists is replaced.

    Args:
        chunks: This rank's model chunks, wrapped or not.
        arch: Their architecture.
        hf_config: The starting model's config.json; its dtype is updated.
        out_dir: Folder to write.
        source_dir: HF folder the run started from; tokenizer, licence and generation settings
            are copied from it.
        topology: This rank's place.
        dtype: Of the written tensors; None: the parameters' own.
        max_shard_bytes: A new file is begun when the next tensor would exceed this.
        tokenizer_path: Folder (or SentencePiece file) of the tokenizer, if not ``source_dir``.
        chat_template: Jinja text that replaces the tokenizer's.
        stop_ids: Ids that end a turn, the one that training wrote first; the folder's generation
            settings will list them all.

    Collectives: every rank must call; data-parallel replicas other than the first only wait. An
    error of the main rank's is every rank's.

    Example:
        export_hf(policy.chunks, arch, hf_config, Path("out/hf"), source_dir=hf_dir,
                  topology=topology)

    Raises:
        UserError: ``out_dir`` is ``source_dir``; the disk is full (nothing is left behind).
    """
    mine = dict(global_parameters(chunks))
    written = dtype or next(iter(mine.values())).dtype

    def complete(folder: Path) -> None:
        copy_companions(folder, Path(source_dir), tokenizer_path, chat_template)
        write_stop_ids(folder, hf_config, stop_ids)
        write_config(folder, hf_config, written)

    export_rows(
        [(row, dtype) for row in rows(arch)], mine, arch, out_dir, complete,
        source_dir=source_dir, topology=topology, max_shard_bytes=max_shard_bytes,
    )


def export_rows(
    table: Sequence[tuple[Row, torch.dtype | None]],
    mine: dict[str, Tensor],
    arch: Architecture,
    out_dir: Path,
    complete: Callable[[Path], None],
    *,
    source_dir: Path,
    topology: Topology,
    max_shard_bytes: int,
) -> None:
    """Stream the tensors of ``table`` into a folder that appears whole or not at all.

    Args:
        table: What to write, each row with the dtype it is cast to (None: as it is).
        mine: This rank's parameters by their canonical name.
        complete: Called on the main rank with the folder, to add everything but the weights.

    Collectives and errors: as ``export_hf``.
    """
    if out_dir.resolve() == Path(source_dir).resolve():
        raise UserError(f"{out_dir} is the folder of the starting model. Choose another one.")
    sink = None
    if topology.dp_rank == 0:
        owners = _owners(mine, topology)
        if topology.is_main:
            plan = [
                TensorPlan(tensor.name, tensor.shape(arch), dtype or owners[row.megatron].dtype)
                for row, dtype in table for tensor in row.hf
            ]
            sink = _Sink(_written(out_dir, plan, max_shard_bytes, complete))
        for row, _ in table:
            tensors = _collect(row, mine, owners[row.megatron], arch, topology)
            if sink is not None:
                for tensor, value in zip(row.hf, tensors, strict=True):
                    sink.send((tensor.name, value))
    # The other ranks hear here what became of it; until now they were sending, or waiting.
    on_main(lambda: sink.end() if sink is not None else None, topology)


def _written(
    out_dir: Path, plan: list[TensorPlan], max_shard_bytes: int, complete: Callable[[Path], None]
) -> Generator[None, tuple[str, Tensor] | None]:
    """Writes the tensors it is sent; None is the end of them."""
    with replacing_folder(out_dir) as partial:
        writer = ShardedWriter(partial, plan, max_shard_bytes)
        while (item := (yield)) is not None:
            writer.add(*item)
        writer.close()
        complete(partial)


class _Sink:
    """Takes tensors for a writer, and goes on taking them when it has failed.

    The other ranks send on, whatever becomes of what they send: an error in their midst would leave
    them waiting in a collective.
    """

    def __init__(self, writer: Generator[None, tuple[str, Tensor] | None]) -> None:
        self._writer = writer
        self._error: Exception | None = None
        self.send(None)  # up to where it waits for the first tensor

    def send(self, item: tuple[str, Tensor] | None) -> None:
        """Pass an item on, or drop it where the writer has failed."""
        if self._error is not None:
            return
        try:
            self._writer.send(item)
        except StopIteration:
            pass
        except Exception as error:  # noqa: BLE001 - raised by ``end``
            self._error = error

    def end(self) -> None:
        """Finish; raise what the writer has met."""
        self.send(None)
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class Owner:
    """Who holds a parameter.

    Attributes:
        stage: The first pipeline stage that does.
        tp_ranks: Which of its tensor-parallel ranks, in order; an expert's are not always all.
        shape, dtype: Of what one of them holds.
    """

    stage: int
    tp_ranks: tuple[int, ...]
    shape: torch.Size
    dtype: torch.dtype


def _owners(mine: dict[str, Tensor], topology: Topology) -> dict[str, Owner]:
    """The owner of every parameter of a replica."""
    # Every rank learns all owners, and so which of its tensors another one will wait for when.
    held = {name: (parameter.shape, parameter.dtype) for name, parameter in mine.items()}
    of_rank: list[Any] = [None] * topology.tp_size
    dist.all_gather_object(of_rank, held, group=topology.tp_group)
    of_stage: list[Any] = [None] * topology.pp_size
    dist.all_gather_object(of_stage, of_rank, group=topology.pp_group)
    owners: dict[str, Owner] = {}
    for stage, ranks in enumerate(of_stage):
        for name, kind in {name: kind for rank in ranks for name, kind in rank.items()}.items():
            holders = tuple(rank for rank, names in enumerate(ranks) if name in names)
            owners.setdefault(name, Owner(stage, holders, *kind))
    return owners


def _gather(shard: Tensor | None, owner: Owner, device: Any, topology: Topology) -> list[Tensor]:
    """All shards of a parameter of this stage, on its first tensor-parallel rank; else nothing."""
    group, rank = topology.tp_group, topology.tp_rank
    if len(owner.tp_ranks) == topology.tp_size:
        assert shard is not None
        shards = [torch.empty_like(shard) for _ in owner.tp_ranks]
        dist.all_gather(shards, shard, group=group)
        return shards if rank == 0 else []
    shards = list[Tensor]()
    for holder in owner.tp_ranks:
        if rank == holder and shard is not None:
            if rank == 0:
                shards.append(shard)
            else:
                dist.send(shard, dst=dist.get_global_rank(group, 0), group=group)
        elif rank == 0:
            shards.append(torch.empty(owner.shape, dtype=owner.dtype, device=device))
            dist.recv(shards[-1], src=dist.get_global_rank(group, holder), group=group)
    return shards


def _collect(
    row: Row, mine: dict[str, Tensor], owner: Owner, arch: Architecture, topology: Topology
) -> list[Tensor]:
    """The row's HF tensors on rank 0 (on the CPU); nothing elsewhere."""
    stage, dtype = owner.stage, owner.dtype
    device = next(iter(mine.values())).device
    tensors: list[Tensor] = []
    if topology.pp_rank == stage:
        mine_of_it = mine.get(row.megatron)
        shard = None if mine_of_it is None else mine_of_it.detach().contiguous()
        if shards := _gather(shard, owner, device, topology):
            tensors = [t.contiguous() for t in hf_tensors(row, shards, arch)]
    if topology.tp_rank != 0:
        return []
    # Stage after stage as the table has them, on every rank of the replica: sends and receives pair
    # up by that order alone. Ranks count over the run, hence the translation.
    if stage != 0:
        first = dist.get_global_rank(topology.pp_group, 0)
        sender = dist.get_global_rank(topology.pp_group, stage)
        if topology.pp_rank == stage:
            for tensor in tensors:
                dist.send(tensor, dst=first, group=topology.pp_group)
        elif topology.pp_rank == 0:
            tensors = [torch.empty(t.shape(arch), dtype=dtype, device=device) for t in row.hf]
            for tensor in tensors:
                dist.recv(tensor, src=sender, group=topology.pp_group)
    return [tensor.cpu() for tensor in tensors] if topology.pp_rank == 0 else []
