"""A Megatron distributed checkpoint into the model of a rank, by Megatron's own loader."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from megatron_irl import platform  # noqa: F401  (must precede megatron)
from megatron_irl.convert.checkpoint_reader import CheckpointReader
from megatron_irl.errors import UserError
from megatron_irl.parallel.topology import Topology

from megatron.core import dist_checkpointing  # isort: skip  (after the platform)


def load_megatron(chunks: Sequence[nn.Module], checkpoint: Path, topology: Topology) -> None:
    """Fill the chunks from a folder that ``find_checkpoint`` returned. Collective.

    Raises:
        UserError: The checkpoint is damaged, or of another model.
    """
    prefix = CheckpointReader(checkpoint).prefix
    try:
        loaded: Any = dist_checkpointing.load(
            _sharded(chunks, topology, prefix), str(checkpoint)
        )
    except (dist_checkpointing.core.CheckpointingException, KeyError) as error:
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read into this model: "
            f"{str(error).splitlines()[0][:300]}"
        ) from error
    for index, chunk in enumerate(chunks):
        state = {n.removeprefix(prefix): t for n, t in loaded[f"model{index}"].items()}
        missing = {name for name, _ in chunk.named_parameters()} - set(state)
        assert not missing, f"not in the sharded state: {sorted(missing)}"
        chunk.load_state_dict(state, strict=False)


def _sharded(chunks: Sequence[Any], topology: Topology, prefix: str = "") -> dict[str, Any]:
    metadata = {"singleton_local_shards": False, "dp_cp_group": topology.dp_group}
    parts = [chunk.sharded_state_dict(prefix=prefix, metadata=metadata) for chunk in chunks]
    # FP8 scales and the like: no part of the model, and absent where the layers are not TE's.
    return {
        f"model{i}": {n: t for n, t in part.items() if not n.endswith("_extra_state")}
        for i, part in enumerate(parts)
    }
