"""What a rank holds whatever its batches are: weights, gradients, optimizer state, by arithmetic.

A lower bound that takes no time, asked by ``train`` before it reads anything large. The other terms
of a plan (activations, cache, what the allocator cannot use) are estimates and come on top.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_irl.adapters.spec import AdapterSpec
from megatron_irl.config import ParallelConfig, Recipe, padded_vocab_size
from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture
from megatron_irl.families.rows import EMBEDDING, HEAD, HfTensor, Row
from megatron_irl.families.table import row_groups
from megatron_irl.families.tensors import Replicated
from megatron_irl.flops import unused_parameters
from megatron_irl.planning.state import element_size, training_state

GIB = 1024**3


def parameters_of(arch: Architecture) -> int:
    """Of the whole model, without padding of its vocabulary."""
    return sum(math.prod(row.shape(arch)) for _, group in row_groups(arch) for row in group)


def active_parameters(arch: Architecture) -> int:
    """Those that a token meets: of a mixture's experts as many as it goes to."""
    chosen = arch.transformer.get("moe_router_topk", 0)
    return parameters_of(arch) - int(unused_parameters(arch, chosen))


@dataclass(frozen=True)
class Certain:
    """Bytes of the fullest rank."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / GIB:.1f}"
                          for field in dataclasses.fields(self))
        return f"{self.total / GIB:.1f} GiB ({parts})"


def stage_elements(arch: Architecture, parallel: ParallelConfig, stage: int) -> int:
    """Parameters of the language model on a rank of a pipeline stage, without heads of algorithms.

    A tied embedding counts once on each stage that has it.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = arch.transformer["num_layers"] // pp
    chunk = layers // (parallel.virtual_pipeline_model_parallel_size or 1)
    total = 0
    for name, rows in row_groups(arch):
        if name.startswith("layer "):
            is_mine = int(name.split()[1]) // chunk % pp == stage
        else:
            is_mine = stage == (0 if name == "embedding" else pp - 1)
        if is_mine:
            total += sum(_elements(row, arch, tp) for row in rows)
    if arch.tie_word_embeddings and pp > 1 and stage == pp - 1:
        total += padded_vocab_size(arch.vocab_size, tp) // tp * arch.dims["hidden"]
    return total


def certain_memory(
    recipe: Recipe, arch: Architecture, adapter: AdapterSpec | None, data_parallel_size: int
) -> Certain:
    """Of a rank of the stage that holds most."""
    parallel = recipe.parallel
    stages = range(parallel.pipeline_model_parallel_size)
    elements = max(stage_elements(arch, parallel, stage) for stage in stages)
    trained = elements if adapter is None else _adapter_elements(adapter, arch, parallel)
    state = training_state(recipe, trained, data_parallel_size)
    return Certain(float(elements * element_size(recipe)), state["gradients"], state["optimizer"])


def refuse_what_cannot_fit(
    recipe: Recipe, arch: Architecture, adapter: AdapterSpec | None, *, data_parallel_size: int,
    device_memory: float,
) -> str | None:
    """Compare with the device before weights are read.

    Args:
        device_memory: Bytes; 0 where unknown.

    Returns:
        What to warn of, under ``parallel.memory_check: warn``; None if there is nothing.

    Raises:
        UserError: It is more than the device has, under ``refuse``.
    """
    how = recipe.parallel.memory_check
    if how == "off" or not device_memory:
        return None
    needed = certain_memory(recipe, arch, adapter, data_parallel_size)
    if needed.total <= device_memory:
        return None
    fits = next(_changes(recipe, arch, adapter, data_parallel_size, device_memory), None)
    ranks = data_parallel_size * recipe.parallel.model_parallel_size
    text = (
        f"this cannot fit: the fullest of {ranks} ranks holds {needed} before any activation, and "
        f"its device has {device_memory / GIB:.1f} GiB."
    )
    remedy = f"Set {fits}" if fits else "Take more ranks"
    if how == "warn":
        return f"{text} {remedy}."
    raise UserError(
        f"{text} {remedy}; `megatron-irl plan` says what fits, and parallel.memory_check=warn "
        "starts all the same."
    )


def _changes(
    recipe: Recipe, arch: Architecture, adapter: AdapterSpec | None, dp: int, room: float
) -> Iterator[str]:
    """Changes with which it would not be too much, the nearest first."""
    parallel, options = recipe.parallel, recipe.optimizer
    if not options.get("optimizer_cpu_offload") and options.get("optimizer", "adam") == "adam":
        moved = replace(recipe, optimizer=options | {"optimizer_cpu_offload": True})
        if certain_memory(moved, arch, adapter, dp).total <= room:
            yield ("optimizer.optimizer_cpu_offload=true, if the host has the memory (16 bytes a "
                   "parameter of a rank)")
    transformer = arch.transformer
    groups = transformer.get("num_query_groups") or transformer["num_attention_heads"]
    tp = parallel.tensor_model_parallel_size
    for size in (n for n in (2, 4, 8) if n > tp and groups % n == 0):
        more = replace(parallel, tensor_model_parallel_size=size)
        also = ""
        if arch.dims["experts"]:  # whose tokens are split as well
            more = replace(more, sequence_parallel=True)
            also = ", parallel.sequence_parallel=true"
        if parallel.expert_model_parallel_size > 1:
            more = replace(more, expert_model_parallel_size=size)
            also += f", parallel.expert_model_parallel_size={size}"
        # With as many ranks if they suffice for a replica.
        left = max(1, dp * tp // size)
        if certain_memory(replace(recipe, parallel=more), arch, adapter, left).total <= room:
            ranks = left * more.model_parallel_size
            yield f"parallel.tensor_model_parallel_size={size}{also} ({ranks} ranks)"
    if adapter is None:
        yield "adapter.rank, so that an adapter is trained alone"


def _elements(row: Row, arch: Architecture, tp: int) -> int:
    size = 1
    for length in row.shape(arch):
        size *= length
    if row.megatron in (EMBEDDING, HEAD):
        size = size // arch.vocab_size * padded_vocab_size(arch.vocab_size, tp)
    return size if isinstance(row.transform, Replicated) else size // tp


def _adapter_elements(adapter: AdapterSpec, arch: Architecture, parallel: ParallelConfig) -> int:
    """At least so many on the fullest rank: at most both matrices are cut over its tensor ranks."""
    total = 0
    for layer in adapter.layers:
        for part in layer.parts:
            out, into = _lengths(layer.row.hf[part], arch)
            total += adapter.rank * (out + into)
    return total // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


def _lengths(tensor: HfTensor, arch: Architecture) -> tuple[int, int]:
    out, into = tensor.shape(arch)
    return out, into
