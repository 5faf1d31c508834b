"""Who this rank is: the only reader of Megatron's ``parallel_state``."""

import copy
import datetime
import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from megatron_irl import hardware
from megatron_irl.compat.gloo_device import share_device
from megatron_irl.config import ParallelConfig
from megatron_irl.errors import UserError
from megatron_irl.parallel.heartbeat import Heartbeat
from megatron_irl.parallel.stop_request import StopRequest

from megatron.core import parallel_state, tensor_parallel  # isort: skip  (after hardware)
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip


@dataclass(frozen=True)
class Topology:
    """This rank's coordinates and groups; travels as an argument, never as a global.

    Attributes:
        groups: Megatron's own collection, as its modules want it.
        tp_group, pp_group, dp_group: Tensor, pipeline and data parallel groups. ``dp_group``
            includes the context-parallel ranks, because they share weights.
        ep_size: Tensor-parallel ranks with experts of their own; 1: they share all.
        stages_group: Of all replicas and stages the ranks with this tensor-parallel rank; None
            without a pipeline.
        vpp_size: Model chunks a rank holds (virtual pipeline stages), 1 without interleaving.
        stop: What this rank has been asked; see ``agreement``.
        heart: Its signs of progress; see ``watchdog``.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    vpp_size: int
    tp_group: Any
    pp_group: Any
    dp_group: Any
    groups: ProcessGroupCollection
    ep_size: int = 1
    stages_group: Any = None
    stop: StopRequest = field(default_factory=StopRequest)
    heart: Heartbeat = field(default_factory=Heartbeat)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """The one rank that writes files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank of the run."""
        dist.barrier()


def initialize(
    parallel: ParallelConfig, *, seed: int = 1234, stop: StopRequest | None = None
) -> Topology:
    """Join the process group given by the environment and build Megatron's groups.

    Args:
        stop: What takes requests to stop this rank; none: nobody asks.

    Collectives: every rank of the run must call. Without ``WORLD_SIZE`` in the environment the
    run is this process alone.

    Raises:
        UserError: The world size does not fit the layout.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(parallel, world_size)
    if not dist.is_initialized():
        hardware.select_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not hardware.IS_CUDA:  # there ranks share cores, and this was not tried with NCCL
            share_device()
        timeout = datetime.timedelta(minutes=parallel.timeout_minutes)
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(hardware.BACKEND, timeout=timeout)
        else:  # this process alone: no port is opened, so that many may run on one machine
            store = dist.HashStore()
            dist.init_process_group(
                hardware.BACKEND, store=store, rank=rank, world_size=world_size, timeout=timeout
            )
    topology = build_topology(parallel, seed=seed)
    return topology if stop is None else replace(topology, stop=stop)


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Raise UserError unless the model-parallel size divides the number of ranks."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    model_ranks = tp * pp * parallel.context_parallel_size
    if world_size % model_ranks:
        raise UserError(
            f"world size {world_size} conflicts with parallel.tensor_model_parallel_size={tp} x "
            f"parallel.pipeline_model_parallel_size={pp} x parallel.context_parallel_size="
            f"{parallel.context_parallel_size}; one model replica needs {model_ranks} ranks. "
            f"Start a multiple of {model_ranks} ranks, or change the layout."
        )


def build_topology(parallel: ParallelConfig, *, seed: int = 1234) -> Topology:
    """Build Megatron's groups over an initialised process group, replacing earlier ones.

    A collective of any of them fails after ``parallel.timeout_minutes``.

    Collectives: every rank must call.
    """
    # Megatron keeps its groups in globals and refuses to set them twice. Every rank makes all
    # groups, in the same order, its own or not: making one is collective over the world.
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=(
            parallel.tensor_model_parallel_size // parallel.expert_model_parallel_size
        ),
        create_gloo_process_groups=False,  # for gathering optimizer states, which nobody does
        distributed_timeout_minutes=parallel.timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed, force_reset_rng=True,
        use_cudagraphable_rng=hardware.IS_CUDA,  # generation's CUDA graphs ask for it
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stages_group = None
    if groups.pp.size() > 1:
        stages_group = _stages_group(groups, parallel.timeout_minutes)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        pp_rank=groups.pp.rank(),
        pp_size=groups.pp.size(),
        dp_rank=groups.dp_cp.rank(),
        dp_size=groups.dp_cp.size(),
        vpp_size=parallel.virtual_pipeline_model_parallel_size or 1,
        tp_group=groups.tp,
        pp_group=groups.pp,
        dp_group=groups.dp_cp,
        groups=groups,
        ep_size=groups.ep.size(),
        stages_group=stages_group,
    )


def _stages_group(groups: ProcessGroupCollection, timeout_minutes: float) -> Any:
    mine, tp_size = None, groups.tp.size()
    for tp_rank in range(tp_size):  # every rank makes all of them, in this order
        group = dist.new_group(
            # In Megatron's order of ranks the tensor-parallel ones are neighbours.
            list(range(tp_rank, dist.get_world_size(), tp_size)),
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
        if tp_rank == groups.tp.rank():
            mine = group
    return mine


def without_pipeline(topology: Topology) -> Topology:
    """The ranks as they are where each holds all layers: stages are replicas too. No collectives.

    Args:
        topology: With a pipeline, and a context-parallel size of 1.
    """
    assert topology.groups.cp.size() == 1, "its group stands for a pipeline of one stage below"
    alone, groups = topology.groups.cp, copy.copy(topology.groups)
    groups.pp = groups.embd = groups.pos_embd = alone
    groups.mp, groups.dp, groups.dp_cp = groups.tp, topology.stages_group, topology.stages_group
    return replace(
        topology, pp_rank=0, pp_size=1, vpp_size=1, pp_group=alone, groups=groups,
        dp_rank=topology.stages_group.rank(), dp_size=topology.stages_group.size(),
        dp_group=topology.stages_group, stages_group=None,
    )


def without_expert_parallelism(topology: Topology) -> ProcessGroupCollection:
    """The groups of an engine whose ranks with experts of their own have the same requests.

    Megatron's would agree about the sizes of their steps before each. No collectives.
    """
    groups = copy.copy(topology.groups)
    groups.ep = topology.groups.cp  # of one rank
    return groups


def shutdown() -> None:
    """Leave the process group; safe to call when there is none."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
