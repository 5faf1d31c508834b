"""The adapter of one linear layer, and the hook that adds it to what the layer gives.

Shape letters: T tokens, I and O the layer's sizes (of this rank's share where tensor parallelism
cuts them), n the HF modules with an adapter that the layer fuses, r their rank.

The layer stays what it is, under its name and of its class: the adapter is a child of it, and a
forward hook adds its part. So base weights are loaded, exported and lent as ever.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.adapters.spec import AdapterSpec
from megatron_irl.families.architecture import Architecture
from megatron_irl.families.linears import TargetedLayer
from megatron_irl.families.table import ADAPTER, heads
from megatron_irl.parallel.topology import Topology

from megatron.core.tensor_parallel import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)

class LoraAdapter(nn.Module):
    """scale * B A x for every HF module that a Megatron linear layer fuses, each with its own A.

    Attributes:
        lora_A: [n r, I], the modules' A below each other.
        lora_B: [O, r] in the layer's own order of rows: every row is of one module, and meets that
            module's A only. Rows of modules without an adapter are zero and stay so.
        is_applied: Off: the layer gives what its base gives.

    Of a column-parallel layer A is whole on every rank and B is cut as the weight is; of a
    row-parallel one A is cut and B whole. A whole one has the same gradient on every rank: without
    sequence parallelism because what meets it is replicated, with it because Megatron sums it
    (``sequence_parallel``). So any rank goes with any tensor-parallel size.
    """

    def __init__(
        self, layer: TargetedLayer, linear: Any, spec: AdapterSpec, arch: Architecture,
        topology: Topology,
    ) -> None:
        super().__init__()
        weight = linear.weight
        out, into = weight.shape
        options = {"dtype": weight.dtype, "device": weight.device}
        self.layer, self.scale, self.dropout = layer, spec.scale, spec.dropout
        self.tp_size, self.tp_group = topology.tp_size, topology.tp_group
        self.is_applied = True
        self.lora_A = nn.Parameter(torch.zeros(len(layer.parts) * spec.rank, into, **options))
        self.lora_B = nn.Parameter(torch.zeros(out, spec.rank, **options))
        split: Any
        whole: Any
        split, whole = (self.lora_A, self.lora_B) if layer.splits_input else (
            self.lora_B, self.lora_A)
        set_tensor_model_parallel_attributes(split, True, int(layer.splits_input), 1)
        whole.sequence_parallel = linear.config.sequence_parallel
        self.owner_On: Tensor | None
        self.register_buffer("owner_On", self._owners(arch, topology, options), persistent=False)

    def _owners(
        self, arch: Architecture, topology: Topology, options: dict[str, Any]
    ) -> Tensor | None:
        """[O, n], 1 where a row of the layer is of a module; None where there is one module."""
        row, parts = self.layer.row, self.layer.parts
        if len(row.hf) == 1:
            return None
        numbers = [torch.full((t.shape(arch)[0],), i) for i, t in enumerate(row.hf)]
        number_O = row.transform.read(numbers, topology.tp_rank, topology.tp_size, heads(arch))
        return torch.stack([number_O == part for part in parts], dim=1).to(**options)

    def forward(self, x: Tensor, *, sequence_parallel: bool, is_head: bool = False) -> Tensor:
        """[.., I] → scale * A x, [.., n r], as B meets it.

        Args:
            sequence_parallel: Whether the layer works so at present.
            is_head: ``x`` is whole, and its gradient is summed over the tensor-parallel group.

        Gradient: to A and ``x``. Collectives: over the tensor-parallel group, of [T, n r].
        """
        if self.dropout and self.training:
            cut = self.layer.splits_input or (sequence_parallel and not is_head)
            x = _drop(x, self.dropout, differs=cut and self.tp_size > 1)
        low = F.linear(x, self.lora_A) * self.scale
        if self.tp_size == 1:
            return low
        group = self.tp_group
        # Collectives meet [T, n r] and not the layer's full width. Which one: A cut gives partial
        # sums, to be added up forward; B cut gives each rank a part of the gradient, to be added up
        # backward. Either way what the layer's own weight has, in the layer's own layout.
        if self.layer.splits_input:
            if sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(low, group=group)
            return reduce_from_tensor_model_parallel_region(low, group=group)
        if is_head and sequence_parallel:
            return low  # the gradient of x is summed behind it, and that of A by Megatron
        if sequence_parallel:
            return gather_from_sequence_parallel_region(
                low, tensor_parallel_output_grad=True, group=group
            )
        return copy_to_tensor_model_parallel_region(low, group=group)

    def matrix(self) -> Tensor:
        """B as [O, n r]: zero where a row does not meet a module's A. Gradient to B."""
        if self.owner_On is None:
            return self.lora_B
        return (self.lora_B[:, None] * self.owner_On[:, :, None]).flatten(1)

    def head_factors(self, hidden_RH: Tensor, *, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
        """What an output head adds to its logits, [R, r] and [O, r]: the first times the second.T.

        Collectives: in the backward pass, over the tensor-parallel group.
        """
        return self(hidden_RH, sequence_parallel=sequence_parallel, is_head=True), self.matrix()

    @torch.no_grad()
    def update(self, rows: slice) -> Tensor:
        """Some rows of scale * B A, float32: what merging adds to the weight. No collective."""
        return (self.matrix()[rows].float() @ self.lora_A.float()).mul_(self.scale)


def attach(linear: Any, adapter: LoraAdapter) -> None:
    """Make an adapter part of a linear layer."""
    setattr(linear, ADAPTER, adapter)
    if hasattr(linear, "return_layernorm_output"):
        # Transformer Engine normalises inside the layer, and A takes what comes out.
        linear.return_layernorm_output = True
    # Before the hooks that are there: a soft cap of logits caps the sum.
    linear.register_forward_hook(_add, prepend=True)


def _add(linear: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor, Tensor | None]:
    """The forward hook: (what the layer gives, its bias) and the adapter's part in the first."""
    out, bias, normalised = _parts(output)
    adapter: LoraAdapter = getattr(linear, ADAPTER)
    if not adapter.is_applied:
        return out, bias
    x = inputs[0] if normalised is None else normalised
    low = adapter(x, sequence_parallel=linear.sequence_parallel)
    matrix = adapter.matrix()
    # Only in generation: training reads the head without calling it (``head_factors``).
    if out.shape[-1] != matrix.shape[0]:  # a head that has gathered its logits
        added = gather_from_tensor_model_parallel_region(low @ matrix.T, group=adapter.tp_group)
        return out + added, bias
    # One pass over the output, where a product and a sum of their own would take two.
    flat = torch.addmm(out.reshape(-1, out.shape[-1]), low.reshape(-1, low.shape[-1]), matrix.T)
    return flat.view(out.shape), bias


def _parts(output: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(output, bias, normalised input) of Megatron's and Transformer Engine's linear layers."""
    out, *rest = output
    if isinstance(out, tuple):
        out, normalised = out
        return out, rest[0], normalised
    if len(rest) == 2:
        return out, rest[0], rest[1]
    return out, rest[0], None


def _drop(x: Tensor, rate: float, *, differs: bool) -> Tensor:
    """Dropout, of random numbers that differ between tensor-parallel ranks or are the same."""
    if not differs:
        return F.dropout(x, rate)
    # Megatron's tracker has a state that differs by tensor-parallel rank; the default one is equal.
    tracker: Any = get_cuda_rng_tracker()
    with tracker.fork():
        return F.dropout(x, rate)
