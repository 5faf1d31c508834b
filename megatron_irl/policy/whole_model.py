"""All layers of a pipeline on each of its ranks, for the time of a generation."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_irl import hardware
from megatron_irl.convert.load import global_parameters
from megatron_irl.families.architecture import Architecture
from megatron_irl.model.build import build_chunks
from megatron_irl.model.specs import choose_spec
from megatron_irl.parallel.topology import Topology, without_pipeline

from megatron.core.utils import get_model_config  # isort: skip

# What says how layers are spread over stages, and what one stage has instead.
_ONE_STAGE = {
    "pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None, "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}
# Of training alone; ``borrow`` lends a model without its 8-bit products too.
_NOT_TRAINED = {"gradient_accumulation_fusion": False, "fp8": None, "fp4": None}


class WholeModel:
    """A model without stages beside the trained one, whose weights are the trained ones' on demand.

    The layers of this rank's own stages are no copies: their parameters lie where the trained ones
    lie. Those of the other stages come over the pipeline group with every ``refresh``, and are
    freed by ``free``; what is left then are modules without memory.

    (Megatron's ``core.resharding``, 0.19.2, knows one chunk of a rank only, and so no virtual
    stages, copies what is there already, and wants CUDA's streams.)

    Args:
        chunks: This rank's, as trained: bare or wrapped, with whatever heads and adapters.
        topology: With a pipeline.

    Attributes:
        topology: The ranks as they are for this model: each stage is a replica.
        nbytes: What the other stages' parameters take on this rank.

    Collectives: construction, over the pipeline.
    """

    def __init__(
        self, chunks: Sequence[Any], topology: Topology, architecture: Architecture
    ) -> None:
        self._chunks, self._trained_on, self._architecture = list(chunks), topology, architecture
        self.topology = without_pipeline(topology)
        mine = {
            name: (tuple(p.shape), p.numel() * p.element_size())
            for name, p in global_parameters(self._chunks)
        }
        found: list[Any] = [None] * topology.pp_size
        dist.all_gather_object(found, mine, group=topology.pp_group)
        # By name the first stage that has it: of a tied embedding the last one has a copy.
        self._owner = {
            name: stage for stage in reversed(range(topology.pp_size)) for name in found[stage]
        }
        sizes = {name: size for of in found for name, (_, size) in of.items()}
        self.nbytes = sum(size for name, size in sizes.items() if name not in mine)
        self._model: Any = None
        self._parameters: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}

    @property
    def config(self) -> Any:
        """Megatron's TransformerConfig of it."""
        config = copy.copy(get_model_config(self._chunks[0]))
        for name, value in (_ONE_STAGE | _NOT_TRAINED).items():
            setattr(config, name, value)
        return config

    def why_not(self) -> str | None:
        """Why these weights cannot be sent as they are; None where they can. Collectives: none."""
        # A quantized parameter is a tensor of its own kind, which has no bytes to be sent.
        if any(type(p.data) is not Tensor for _, p in global_parameters(self._chunks)):
            return "its weights are kept in 8 bits"
        return None

    def allocate(self) -> list[Any]:
        """Make room for the weights, whatever they are before the first ``refresh``.

        Returns:
            The model, in a list as chunks are. Collectives: none.

        Raises:
            RuntimeError: There is not enough memory.
        """
        if self._model is None:
            trained = get_model_config(self._chunks[0])
            spec = choose_spec(
                trained.params_dtype, trained.fp8, local_only=self._architecture.local_only
            )
            [self._model] = build_chunks(
                self.config, self._architecture, self.topology, spec=spec
            )
            self._model.requires_grad_(False)
            self._parameters = dict(global_parameters([self._model]))
            self._shapes = {name: p.shape for name, p in self._parameters.items()}
        mine = dict(global_parameters(self._chunks))
        for name, parameter in self._parameters.items():
            if name in mine:
                # Updates are in place, so this is what it is until the weights are freed.
                parameter.data = mine[name].data
            elif parameter.numel() != self._shapes[name].numel():
                parameter.data = parameter.data.new_empty(self._shapes[name])
        return [self._model]

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the weights of the other stages up to date.

        The trained ones must be complete (``Policy.complete_gather``). Collectives: over the
        pipeline, a broadcast of each parameter by the stage that trains it.
        """
        group = self._trained_on.pp_group
        ranks = dist.get_process_group_ranks(group)
        # Not waited for one by one: stages send what they have at the same time.
        works: list[Any] = [
            dist.broadcast(parameter.data, ranks[self._owner[name]], group=group, async_op=True)
            for name, parameter in self._parameters.items()
        ]
        for work in works:
            work.wait()

    def free(self) -> None:
        """Give the memory back."""
        for parameter in self._parameters.values():
            parameter.data = parameter.data.new_empty(0)
        hardware.release_cached_memory()
