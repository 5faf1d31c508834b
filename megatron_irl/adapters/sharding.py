"""What Megatron's distributed checkpointing saves of a chunk with adapters: those, and no base."""

from collections.abc import Callable
from typing import Any

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.adapters.lora import LoraAdapter
from megatron_irl.families.table import ADAPTER, HEAD, REWARD_HEAD, is_extra_state
from megatron_irl.families.tensors import FusedGateUp, GateUp
from megatron_irl.parallel.topology import Topology

from megatron.core.transformer.mlp import apply_swiglu_sharded_factory  # isort: skip
from megatron.core.utils import (  # isort: skip
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)

Sharded = dict[str, Any]


def save_adapters_only(chunk: Any, layers: dict[str, Any], topology: Topology) -> None:
    """Replace the chunk's ``sharded_state_dict`` by one without base weights.

    Whoever saves and loads the chunk, and its optimizer, asks that and nothing else. Names in a
    checkpoint are the base weight's with the number of the layer in the whole model, so that any
    layout reads what another one wrote.

    Args:
        layers: Those with adapters, of this and other chunks, by the canonical name of the weight.
    """
    # On the instance: Megatron's DDP and optimizer ask the module itself for what it saves.
    whole: Callable[..., Sharded] = chunk.sharded_state_dict
    places = {id(module): name for name, module in chunk.named_modules()}
    mine = {name: layer for name, layer in layers.items() if id(layer) in places}

    def adapters_only(
        prefix: str = "", sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Sharded:
        state = {
            name: entry
            for name, entry in whole(prefix, sharded_offsets, metadata).items()
            # Those of Transformer Engine's experts are numbered, and must all be there or none.
            if name.startswith(prefix + REWARD_HEAD) or is_extra_state(name)
        }
        for name, layer in mine.items():
            state |= _adapter_state(
                getattr(layer, ADAPTER), f"{prefix}{places[id(layer)]}.{ADAPTER}.",
                f"{prefix}{name.removesuffix('.weight')}.{ADAPTER}.", topology,
            )
        return state

    chunk.sharded_state_dict = adapters_only


def _adapter_state(
    adapter: LoraAdapter, place: str, key: str, topology: Topology
) -> Sharded:
    """The two matrices by their name in the chunk, to be stored under ``key``."""
    groups = {"tp_group": topology.tp_group, "dp_cp_group": topology.dp_group}
    axis = int(adapter.layer.splits_input)
    split, whole = ("lora_A", "lora_B") if axis else ("lora_B", "lora_A")
    state: Sharded = {
        place + whole: make_sharded_tensor_for_checkpoint(
            getattr(adapter, whole), key + whole, **groups
        ),
        place + split: make_tp_sharded_tensor_for_checkpoint(
            getattr(adapter, split), key + split, axis,
            # A vocabulary's padding depends on the layout.
            allow_shape_mismatch=adapter.layer.row.megatron == HEAD, **groups,
        ),
    }
    # Gate and up are split over ranks each by itself; the factory stores them as two tensors.
    if isinstance(adapter.layer.row.transform, GateUp | FusedGateUp):
        state[place + split] = apply_swiglu_sharded_factory(state[place + split], ())
    return state
