"""Adapters on their ranks → a folder in peft's format."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_irl.adapters.adapters import Adapters
from megatron_irl.convert.export import export_rows
from megatron_irl.convert.hf_folder import SINGLE
from megatron_irl.convert.peft_folder import WEIGHTS, PeftFolder, tensor_names, write_config
from megatron_irl.families.architecture import Architecture
from megatron_irl.families.linears import TargetedLayer
from megatron_irl.families.rows import HfTensor, Row
from megatron_irl.families.table import ADAPTER
from megatron_irl.families.tensors import Heads, Replicated, Split, Transform
from megatron_irl.storage.commit import replacing_folder


def export_adapter(
    adapters: Adapters, out_dir: Path, *, base: Path, digest: str, dtype: torch.dtype | None = None
) -> None:
    """Write the adapters as peft would; the folder appears whole or not at all.

    Args:
        base: HF folder below them, and ``digest`` of it, both named in the folder.
        dtype: Of the matrices; None: the parameters' own.

    Collectives: every rank must call. Raises: UserError as ``export_hf``.
    """
    spec, topology = adapters.spec, adapters.topology
    # The rank becomes a dimension like the model's own, so that rows of two matrices a layer can be
    # gathered, checked and written as the rows of weights are.
    arch = _WithRank(**{f.name: getattr(adapters.arch, f.name) for f in fields(adapters.arch)},
                     rank=spec.rank)
    mine: dict[str, Tensor] = {}
    for name, layer in adapters.layers.items():
        module = getattr(layer, ADAPTER)
        mine |= {_key(name, "A"): module.lora_A, _key(name, "B"): module.lora_B}

    def complete(folder: Path) -> None:
        (folder / SINGLE).rename(folder / WEIGHTS)
        write_config(
            folder, rank=spec.rank, alpha=spec.alpha, dropout=spec.dropout,
            targets=spec.target_names, base=base, digest=digest,
        )

    export_rows(
        [(row, dtype) for layer in spec.layers for row in _rows(layer)], mine, arch, out_dir,
        complete, source_dir=base, topology=topology, max_shard_bytes=1 << 62,  # one file, for peft
    )


def join_adapters(folders: Sequence[Path], out_dir: Path, *, base: Path, digest: str) -> None:
    """One adapter that adds what several add, one after the other: their ranks side by side.

    For the main rank.
    """
    parts = [PeftFolder.read(folder) for folder in folders]
    states = [load_file(folder / WEIGHTS) for folder in folders]
    joined = {
        name: torch.cat([state[name] for state in states], dim=0 if ".lora_A." in name else 1)
        for name in states[0]
    }
    # B_1 A_1 + B_2 A_2 = [B_1 B_2] [A_1; A_2]. The scale alpha / rank stays, as both grow alike.
    first, count = parts[0], len(parts)
    with replacing_folder(out_dir) as folder:
        save_file(joined, folder / WEIGHTS, metadata={"format": "pt"})
        write_config(
            folder, rank=first.rank * count, alpha=first.alpha * count, dropout=0.0,
            targets=first.targets, base=base, digest=digest,
        )


@dataclass(frozen=True)
class _WithRank(Architecture):
    rank: int = 0

    @property
    def dims(self) -> dict[str, int]:
        return super().dims | {"rank": self.rank}


@dataclass(frozen=True)
class _Stacked:
    """A of several modules below each other; ``inner`` says what each rank holds of them."""

    inner: Transform
    count: int

    def read(self, sources: Sequence[Any], tp_rank: int, tp_size: int, heads: Heads) -> Tensor:
        return self.inner.read([torch.cat([s[:] for s in sources])], tp_rank, tp_size, heads)

    def write(self, shards: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        return list(self.inner.write(shards, heads)[0].chunk(self.count))


@dataclass(frozen=True)
class _Some:
    """Of what ``inner`` makes, the modules that have an adapter."""

    inner: Transform
    parts: tuple[int, ...]

    def read(self, sources: Sequence[Any], tp_rank: int, tp_size: int, heads: Heads) -> Tensor:
        raise NotImplementedError("B is read by Adapters.read, which knows the modules without one")

    def write(self, shards: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        whole = self.inner.write(shards, heads)
        return [whole[part] for part in self.parts]


def _rows(layer: TargetedLayer) -> tuple[Row, Row]:
    """How the two matrices of a layer become peft's tensors."""
    row = layer.row
    a, b = [], []
    for part, module in zip(layer.parts, layer.modules, strict=True):
        out, into = row.hf[part].dims
        name_a, name_b = tensor_names(module)
        a.append(HfTensor(name_a, ("rank", into)))
        b.append(HfTensor(name_b, (out, "rank")))
    whole = Replicated()
    inner_a, inner_b = (Split(1), whole) if layer.splits_input else (whole, row.transform)
    return (
        Row(_key(row.megatron, "A"), _Stacked(inner_a, len(layer.parts)), tuple(a)),
        Row(_key(row.megatron, "B"), _Some(inner_b, layer.parts), tuple(b)),
    )


def _key(weight: str, which: str) -> str:
    return f"{weight.removesuffix('.weight')}.{ADAPTER}.lora_{which}"
