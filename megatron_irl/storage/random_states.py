"""The random states of a rank, as a checkpoint keeps them.

Sampling and data order have seeds of their own, so these matter to dropout only and may be left
alone when the layout changes.
"""

from typing import Any

import numpy as np
import torch

from megatron_irl import hardware
from megatron_irl.parallel.topology import Topology

from megatron.core import tensor_parallel  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject  # isort: skip


def random_states(topology: Topology) -> ShardedObject:
    """The states now, of which each pipeline and tensor rank has its own."""
    t = topology
    states = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "tracker": _tracker().get_states(),
        "device": hardware.get_rng_state(),
    }
    return ShardedObject(
        "rng", states, (t.pp_size, t.tp_size), (t.pp_rank, t.tp_rank), replica_id=t.dp_rank,
    )


def restore_random_states(states: Any) -> None:
    """Set what ``random_states`` found; anything but states is left alone."""
    if not isinstance(states, dict):
        return
    # Each rank reads the state of its (pp, tp) place; replicas share the one that was saved.
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    _tracker().set_states(states["tracker"])
    hardware.set_rng_state(states["device"])


def _tracker() -> Any:
    """Megatron's tracker of the random states of model-parallel regions."""
    return tensor_parallel.get_cuda_rng_tracker()
