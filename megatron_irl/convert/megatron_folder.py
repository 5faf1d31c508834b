"""A Megatron distributed checkpoint into the model of a rank, by Megatron's own loader."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.compat.shard_overlaps import compared_by_place
from megatron_irl.convert.checkpoint_reader import CheckpointReader, first_line
from megatron_irl.convert.hf_config import Architecture
from megatron_irl.errors import UserError
from megatron_irl.families.table import is_extra_state
from megatron_irl.parallel.topology import Topology

from megatron.core import dist_checkpointing  # isort: skip  (after hardware)


def load_megatron(
    chunks: Sequence[nn.Module], arch: Architecture, checkpoint: Path, topology: Topology
) -> None:
    """Fill the chunks from a folder that ``find_checkpoint`` returned. Collective.

    Any layout reads what another one wrote, under either spec: Transformer Engine's extra state is
    left alone, and norms are found whether they were fused or not.

    Raises:
        UserError: The checkpoint is damaged, or of another model.
    """
    reader = CheckpointReader(checkpoint)
    reader.check(arch)
    prefix, wanted = reader.prefix, sharded_weights(chunks, topology, reader.prefix)
    adapt_to_spec(wanted, checkpoint)
    try:
        with compared_by_place():
            loaded: Any = dist_checkpointing.load(wanted, str(checkpoint))
    except CheckpointException as error:  # torch's; what happened is inside, by rank
        cause = next(iter(error.failures.values()))[0]
        raise UserError(
            f"the checkpoint {checkpoint} is damaged: {first_line(cause)}"
        ) from error
    for index, chunk in enumerate(chunks):
        state = {n.removeprefix(prefix): t for n, t in loaded[f"model{index}"].items()}
        fill(chunk, state)


def fill(chunk: nn.Module, state: dict[str, Any]) -> None:
    """Load a chunk's state, of which only Transformer Engine's extra state may be missing, and
    weights that are frozen below adapters.
    """
    missing = {n for n, p in chunk.named_parameters() if p.requires_grad} - set(state)
    assert not missing, f"not in the sharded state: {sorted(missing)}"
    chunk.load_state_dict(state, strict=False)


def adapt_to_spec(model: dict[str, Any], checkpoint: Path) -> None:
    """Ask a checkpoint only for what the spec that wrote it keeps. In place.

    Transformer Engine's layers have extra state (FP8 scales) that local ones have not. A norm is
    looked for by itself where it is not fused with the linear layer after it.

    Args:
        model: Sharded state by chunk and name.
    """
    reader = CheckpointReader(checkpoint)
    for part in model.values():
        for name, entry in list(part.items()):
            entry.key = reader.stored_as(entry.key)
            if is_extra_state(name) and not reader.holds(entry.unique_key):
                del part[name]


def sharded_weights(
    chunks: Sequence[Any], topology: Topology, prefix: str = "", **metadata: Any
) -> dict[str, Any]:
    """The chunks' parameters as Megatron's checkpointing wants them, by chunk and name.

    Args:
        metadata: More of how Megatron is to lay them out.
    """
    metadata |= {"singleton_local_shards": False, "dp_cp_group": topology.dp_group}
    parts = [chunk.sharded_state_dict(prefix=prefix, metadata=metadata) for chunk in chunks]
    # FP8 scales and the like: no part of the model, and absent where the layers are not TE's.
    return {
        f"model{i}": {n: t for n, t in part.items() if not is_extra_state(n)}
        for i, part in enumerate(parts)
    }
