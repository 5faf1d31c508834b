"""Layouts that fit, ranked by how fast a round would be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_irl.algorithms.base import algorithm_of
from megatron_irl.config import Recipe, check_layout
from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture
from megatron_irl.flops import layer_parameters
from megatron_irl.planning.machines import Machine
from megatron_irl.planning.plan import Plan, make_plan, setup_of, stage_parameters
from megatron_irl.planning.workload import Lengths, Workload, workload_of

_MICRO_BATCHES = (1, 2, 4, 8, 16)
_FULL: dict[str, Any] = {
    "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
}
_OFFLOAD: dict[str, dict[str, Any]] = {
    "no": {}, "optimizer": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0},
}


@dataclass(frozen=True)
class Found:
    """A layout that fits, as overrides of the recipe, and its plan."""

    overrides: tuple[str, ...]
    plan: Plan


def layouts_that_fit(
    recipe: Recipe, arch: Architecture, machine: Machine, lengths: Lengths, *, world_size: int,
    most: int = 5,
) -> list[Found]:
    """The fastest layouts of so many ranks in which every pack fits; empty if there is none.

    Tensor, pipeline and virtual pipeline size, whether experts are split or shared out, pairs a
    microbatch, recomputation, and the optimizer on the host. Of layouts that differ in one of the
    last four the fastest is kept.
    """
    parameters: dict[tuple[int, int], Any] = {}
    works: dict[tuple[int, int], Workload] = {}
    best: dict[tuple[int, int, int], Found] = {}
    for candidate, dp in _candidates(recipe, arch, machine, world_size):
        parallel = candidate.parallel
        key = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size,
               parallel.virtual_pipeline_model_parallel_size or 1)
        try:
            check_layout(candidate, world_size)
            if key[:2] not in parameters:
                setup = setup_of(candidate, arch, machine, dp)
                parameters[key[:2]] = stage_parameters(setup, algorithm_of(candidate))
            packed = dp, candidate.train.micro_batch_size
            if packed not in works:
                works[packed] = workload_of(candidate, algorithm_of(candidate), lengths, dp)
            plan = make_plan(candidate, arch, machine, lengths, data_parallel_size=dp,
                             parameters=parameters[key[:2]], work=works[packed])
        except UserError:  # the sizes do not divide the model or the batch
            continue
        if plan.always_fits and (
            key not in best or plan.time.total < best[key].plan.time.total
        ):
            best[key] = Found(_overrides(recipe, candidate), plan)
    return sorted(best.values(), key=lambda found: found.plan.time.total)[:most]


def _candidates(
    recipe: Recipe, arch: Architecture, machine: Machine, world_size: int
) -> Iterator[tuple[Recipe, int]]:
    layers = arch.transformer["num_layers"]
    for tp in (n for n in (1, 2, 4, 8) if n <= min(world_size, machine.per_node)):
        for pp in (n for n in range(1, 17) if layers % n == 0 and world_size % (tp * n) == 0):
            dp = world_size // (tp * pp)
            if _least(recipe, arch) / (tp * pp) > machine.memory:
                continue
            for vpp in {None, *(n for n in (2, 4, 5) if pp > 1 and layers % (pp * n) == 0)}:
                for ep in {1, tp} if arch.dims["experts"] else {1}:
                    parallel = replace(
                        recipe.parallel, tensor_model_parallel_size=tp,
                        pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp,
                        expert_model_parallel_size=ep, sequence_parallel=tp > 1,
                        data_parallel_size=dp,
                    )
                    for changed in _variants(replace(recipe, parallel=parallel), arch):
                        yield changed, dp


def _least(recipe: Recipe, arch: Architecture) -> float:
    """Bytes of weights and gradients of all layers, which every layout has to hold."""
    weights = arch.transformer["num_layers"] * layer_parameters(arch, arch.dims["experts"])
    gradients = 4.0 if recipe.ddp.get("grad_reduce_in_fp32", True) else 2.0
    return weights * (gradients + (4.0 if recipe.precision == "fp32" else 2.0))


def _variants(recipe: Recipe, arch: Architecture) -> Iterator[Recipe]:
    """Pairs a microbatch, recomputation and offload; the cheapest first, so that few are tried."""
    module = "moe" if arch.dims["experts"] else "mlp"
    some = {"recompute_granularity": "selective", "recompute_modules": [module]}
    plain = {k: v for k, v in recipe.model.overrides.items() if not k.startswith("recompute")}
    sizes = _MICRO_BATCHES if recipe.train.micro_batch_tokens is None else (1,)
    for micro in sizes:
        for recompute in ({}, some, _FULL):
            for offload in _OFFLOAD.values():
                yield replace(
                    recipe, train=replace(recipe.train, micro_batch_size=micro),
                    model=replace(recipe.model, overrides=plain | recompute),
                    optimizer={k: v for k, v in recipe.optimizer.items() if "offload" not in k}
                    | offload,
                )


def _overrides(before: Recipe, after: Recipe) -> tuple[str, ...]:
    """What to write behind the recipe on the command line to get the other one."""
    said = [
        f"parallel.{name}={_text(getattr(after.parallel, name))}"
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size",
                     "virtual_pipeline_model_parallel_size", "expert_model_parallel_size",
                     "sequence_parallel", "data_parallel_size")
        if getattr(after.parallel, name) != getattr(before.parallel, name)
    ]
    if after.train.micro_batch_size != before.train.micro_batch_size:
        said.append(f"train.micro_batch_size={after.train.micro_batch_size}")
    for section, old, new in (("model", before.model.overrides, after.model.overrides),
                              ("optimizer", before.optimizer, after.optimizer)):
        said += [f"{section}.{k}={_text(new.get(k))}" for k in sorted({*old, *new})
                 if old.get(k) != new.get(k)]
    return tuple(said)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(
        value)
