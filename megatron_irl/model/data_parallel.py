"""Megatron's data parallelism around model chunks."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.config import check_open_section
from megatron_irl.errors import UserError
from megatron_irl.parallel.topology import Topology

from megatron.core.distributed import (  # isort: skip
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip


def build_ddp_config(overrides: dict[str, Any] | None = None) -> DistributedDataParallelConfig:
    """Megatron's DDP configuration: our defaults, then the recipe's ``ddp:`` keys.

    The defaults are a distributed optimizer and gradients accumulated and reduced in fp32.

    Raises:
        UserError: An unknown key, or values that Megatron refuses.
    """
    overrides = dict(overrides or {})
    check_open_section("ddp", overrides, DistributedDataParallelConfig)
    if overrides.get("average_in_collective"):
        raise UserError(
            "ddp.average_in_collective=true conflicts with a loss divided by the global count of "
            "items: gradients are summed over data parallelism. Remove ddp.average_in_collective."
        )
    fields: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": False,
        "check_for_nan_in_grad": False,  # our own finite check names the step and keeps the state
    }
    try:
        return DistributedDataParallelConfig(**(fields | overrides))
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"Megatron-Core refuses this ddp configuration: {error}") from error


def wrap_data_parallel(
    chunks: Sequence[nn.Module],
    config: TransformerConfig,
    topology: Topology,
    ddp_config: DistributedDataParallelConfig,
) -> list[DistributedDataParallel]:
    """Wrap chunks in Megatron's DDP, which owns the gradient buffers.

    Args:
        ddp_config: As ``build_ddp_config`` makes it.
    """
    return [
        DistributedDataParallel(
            config,
            ddp_config,
            chunk,
            # Only the first chunk's gradients are on the critical path of the interleaved schedule.
            disable_bucketing=index > 0,
            pg_collection=topology.groups,
        )
        for index, chunk in enumerate(chunks)
    ]
