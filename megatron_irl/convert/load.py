"""HF weights straight into the tensor- and pipeline-parallel rank that owns them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_irl.convert.hf_config import Architecture
from megatron_irl.convert.hf_folder import HfWeights, validate_hf_folder
from megatron_irl.errors import UserError
from megatron_irl.families.table import (
    ADAPTER,
    EMBEDDING,
    HEAD,
    REWARD_HEAD,
    Row,
    canonical,
    heads,
    hf_head,
    is_of_expert,
    rows,
)
from megatron_irl.parallel.main_rank import everywhere
from megatron_irl.parallel.topology import Topology

__all__ = [
    "global_parameters", "load_hf_weights", "load_hf_weights_once", "validate_hf_folder"
]


def load_hf_weights(
    chunks: Sequence[nn.Module], arch: Architecture, hf_dir: Path, *, tp_rank: int, tp_size: int,
    ep_size: int = 1,
) -> None:
    """Fill every parameter of this rank's chunks in place, reading only the slices it owns.

    Values are cast to the parameter's dtype. The last stage's copy of a tied embedding is filled
    from the embedding. Of a reward model the folder has no output layer, which stays as it is.

    Args:
        ep_size: How many of the tensor-parallel ranks hold experts of their own.

    Raises:
        UserError: A tensor is missing, has the wrong shape, or holds NaN or infinity (also after
            the cast), by tensor and file; a tied head that differs from the embedding.
    """
    weights = HfWeights(hf_dir)
    table = {row.megatron: row for row in rows(arch)}
    for name, parameter in global_parameters(chunks):
        if name == HEAD and arch.reward:
            continue
        row = table[EMBEDDING if name == HEAD and arch.tie_word_embeddings else name]
        weights.check(row.hf, arch)
        sources = [weights.slice(tensor.name) for tensor in row.hf]
        size = tp_size // ep_size if row.of_experts else tp_size
        shard = row.transform.read(sources, tp_rank % size, size, heads(arch))
        if name == EMBEDDING and arch.tie_word_embeddings and hf_head(arch) in weights.files:
            check_tied_head(weights, row, shard, tp_rank, tp_size, arch)
        shard = shard.to(parameter.dtype)
        # copy_ would broadcast, and so hide a parameter that the table lays out differently.
        assert shard.shape == parameter.shape, f"{name}: {shard.shape} against {parameter.shape}"
        if not torch.isfinite(shard).all():
            refuse_not_finite(weights, row, parameter.dtype)
        with torch.no_grad():
            parameter.copy_(shard)


def load_hf_weights_once(
    chunks: Sequence[nn.Module], arch: Architecture, hf_dir: Path, topology: Topology
) -> None:
    """As ``load_hf_weights``, each slice read by one data-parallel rank and sent to the others.

    So a run reads the folder once, however many replicas it has; also when the reference's weights
    are swapped in each round. They are read again then and not kept: a second copy in host memory
    would cost every machine the model's size for the whole run, and the files are in its page
    cache or a file server's. Collective over every rank.

    Raises:
        UserError: As ``load_hf_weights``, on every rank.
    """
    parameters = [parameter for _, parameter in global_parameters(chunks)]
    # A quantized parameter is a tensor of its own kind, which has no bytes to be sent as they are.
    can_be_sent = all(type(parameter.data) is Tensor for parameter in parameters)

    def read() -> None:
        if topology.dp_rank == 0 or not can_be_sent:
            load_hf_weights(
                chunks, arch, hf_dir, tp_rank=topology.tp_rank, tp_size=topology.tp_size,
                ep_size=topology.ep_size,
            )

    everywhere(read, topology)
    if topology.dp_size > 1 and can_be_sent:
        # Data-parallel ranks hold the same parameters in the same order. After everybody has heard
        # that reading went well: a broadcast whose source failed would wait for its timeout.
        source = dist.get_global_rank(topology.dp_group, 0)
        for parameter in parameters:
            dist.broadcast(parameter.data, src=source, group=topology.dp_group)


def global_parameters(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's parameters by their canonical name with the global numbers.

    A stage numbers its layers from 0; Megatron's ``layer_number`` counts them globally from 1. A
    rank numbers its experts from 0.
    The reward head and adapters are none of them: they are in no HF folder of a language model.
    """
    for wrapped in chunks:
        chunk: Any = wrapped
        while hasattr(chunk, "module"):
            chunk = chunk.module
        layers = list(chunk.decoder.layers)
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[0] == REWARD_HEAD or ADAPTER in parts:
                continue
            if parts[:2] == ["decoder", "layers"]:
                layer = layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
                parts = canonical(".".join(parts)).split(".")
                if is_of_expert(".".join(parts)):
                    parts[6] = str(layer.mlp.local_expert_indices[int(parts[6])])
            yield canonical(".".join(parts)), parameter


def check_tied_head(
    weights: HfWeights, row: Row, embedding: Tensor, tp_rank: int, tp_size: int, arch: Architecture
) -> None:
    """Refuse a folder that says its head is tied but holds another head.

    Versions of transformers disagree on which one wins, so neither is right.
    """
    name = hf_head(arch)
    head = row.transform.read([weights.slice(name)], tp_rank, tp_size, heads(arch))
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise UserError(
            f"{weights.where(name)}: {name} differs from {row.hf[0].name}, which conflicts "
            "with tie_word_embeddings=true in config.json. Set it to false, or remove the tensor."
        )


def refuse_not_finite(weights: HfWeights, row: Row, dtype: torch.dtype) -> None:
    """Name the tensors behind a shard that is not finite; they are read again, whole."""
    names = [t.name for t in row.hf]
    bad = [n for n in names if not torch.isfinite(weights.slice(n)[:].to(dtype)).all()]
    places = ", ".join(f"{n} in {weights.where(n)}" for n in bad)
    raise UserError(
        f"NaN or infinite weights (as {str(dtype).removeprefix('torch.')}): {places}. The model "
        "is damaged, or its training diverged; take another copy."
    )
