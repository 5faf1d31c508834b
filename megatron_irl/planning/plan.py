"""A plan: memory of every stage, time of a round, a verdict."""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_irl.algorithms.base import Algorithm, algorithm_of
from megatron_irl.config import Recipe
from megatron_irl.config.schema import AdapterConfig
from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture
from megatron_irl.generation.residency import SPARE
from megatron_irl.model.build import build_config
from megatron_irl.model.specs import VARIABLE
from megatron_irl.parallel.topology import Topology
from megatron_irl.planning.activations import (
    Attach,
    PerToken,
    attach_adapter,
    parameters_of_stage,
    per_token,
    shallow,
)
from megatron_irl.planning.fake_world import fake_world
from megatron_irl.planning.layout import Setup
from megatron_irl.planning.machines import GIB, Machine
from megatron_irl.planning.memory import StageMemory, stage_memory
from megatron_irl.planning.state import checkpoint_bytes, element_size
from megatron_irl.planning.time import RoundTime, round_time
from megatron_irl.planning.workload import Lengths, Workload, workload_of

PROFILE_TOKENS = (512,)  # lengths of the microbatch whose layers are looked at


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on a machine.

    Attributes:
        stages: Memory with the packs that the recipe would draw, and
        worst: with the longest that the limits of the data allow.
        files: Bytes of what a run leaves, by name.
    """

    setup: Setup
    work: Workload
    stages: tuple[StageMemory, ...]
    worst: tuple[StageMemory, ...]
    time: RoundTime
    files: dict[str, float]

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.needed)

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory for the packs that the recipe would draw."""
        return self.fullest.needed <= self.setup.machine.memory

    @property
    def always_fits(self) -> bool:
        """Whether it has it for any packs."""
        return max(stage.needed for stage in self.worst) <= self.setup.machine.memory

    def verdict(self) -> str:
        """In a sentence."""
        memory, stage = self.setup.machine.memory, self.fullest
        room = f"{stage.needed / GIB:.1f} of {memory / GIB:.1f} GiB"
        if not self.fits:
            phase, size = max(stage.phases.items(), key=lambda item: item[1])
            names = sorted(stage.parts[phase], key=lambda name: -stage.terms[name])[:3]
            terms = ", ".join(f"{name} {stage.terms[name] / GIB:.1f}" for name in names)
            return (f"does not fit: {room} on stage {stage.stage} while in {phase} "
                    f"(largest terms, GiB: {terms})")
        if not self.always_fits:
            most = max(s.needed for s in self.worst)
            return (f"fits ({room}), but not packs of nothing but records as long as the limits "
                    f"allow ({most / GIB:.1f} GiB)")
        return f"fits: {room} on the fullest rank, and in every pack that the limits allow"


def make_plan(
    recipe: Recipe, arch: Architecture, machine: Machine, lengths: Lengths, *,
    data_parallel_size: int, parameters: Mapping[int, Any] | None = None,
    work: Workload | None = None,
) -> Plan:
    """Plan a resolved recipe. In a process without a process group.

    Args:
        parameters, work: What ``stage_parameters`` and ``workload_of`` say of it, if known.

    Raises:
        UserError: The layout does not divide the model, or Megatron refuses the configuration.
    """
    setup = setup_of(recipe, arch, machine, data_parallel_size)
    algorithm = algorithm_of(recipe)
    work = work or workload_of(recipe, algorithm, lengths, data_parallel_size)
    known = parameters or stage_parameters(setup, algorithm)
    setup, (stages, worst) = _memory(setup, known, work)
    fullest = max(stages, key=lambda stage: stage.parameters)
    adapter = fullest.trainable if fullest.trainable < 0.5 * fullest.parameters else None
    time = round_time(
        setup, work, parameters=fullest.parameters, adapter=adapter,
        whole=sum(stage.parameters for stage in stages),
    )
    return Plan(setup, work, stages, worst, time, _files(setup, stages, work))


def _memory(
    setup: Setup, parameters: Mapping[int, Any], work: Workload
) -> tuple[Setup, list[tuple[StageMemory, ...]]]:
    """Memory by stage of drawn and of longest packs, and how stages generate for it."""
    profile = activations_of(setup)
    whole = float(sum(n * size for stage in range(setup.pp)
                      for n, size, _ in parameters[stage].values()))

    def of(setup: Setup) -> list[tuple[StageMemory, ...]]:
        return [tuple(
            stage_memory(
                setup, stage, parameters[stage], profile, work, worst=is_worst, whole=whole)
            for stage in range(setup.pp)
        ) for is_worst in (False, True)]

    adapter, asked = setup.recipe.adapter, setup.recipe.generation.pipeline
    applied = adapter.enabled and adapter.generation == "applied"
    if setup.pp == 1 or asked == "stages" or applied or not work.samples:
        return setup, of(setup)
    replicas = replace(setup, replicas=True)
    found, room = of(replicas), setup.machine.memory * (1 - SPARE)
    if asked == "auto" and any(
        stage.with_reserve(stage.phases["generation"]) > room for stage in found[0]
    ):
        return setup, of(setup)
    return replicas, found


def setup_of(recipe: Recipe, arch: Architecture, machine: Machine, dp: int) -> Setup:
    """What follows from recipe and machine. Raises as ``build_config``."""
    if recipe.precision == "fp8" and not machine.fp8:
        raise UserError(
            f"precision=fp8 conflicts with --gpu {machine.name}, which has no FP8 products. Set "
            "precision to bf16, or give another GPU."
        )
    config = build_config(
        arch, recipe.parallel, precision=recipe.precision, overrides=recipe.model.overrides,
        check_hardware=False,
    )
    lean = (recipe.precision != "fp32" and not arch.local_only
            and os.environ.get(VARIABLE) != "local")
    return Setup(recipe, arch, config, machine, dp, lean)


def stage_parameters(
    setup: Setup, algorithm: Algorithm
) -> dict[int, dict[str, tuple[int, int, bool]]]:
    """By stage, as ``parameters_of_stage``; stages in the middle are all alike.

    Layers are alike too: one of each chunk is built, which stands for all of them. (A mixture of
    128 experts takes a tenth of a second a layer, and a search looks at many layouts.)
    """
    recipe, chunks = setup.recipe, setup.pp * setup.vpp
    few = shallow(setup.arch, chunks)
    built: dict[int, dict[str, tuple[int, int, bool]]] = {}
    for stage in sorted({0, min(1, setup.pp - 1), setup.pp - 1}):
        with fake_world(recipe.parallel, data_parallel_size=setup.dp, pp_rank=stage) as topology:
            plain = build_config(
                few, recipe.parallel, check_hardware=False,
                precision="bf16" if recipe.precision == "fp8" else recipe.precision,
                overrides={k: v for k, v in recipe.model.overrides.items()
                           if not k.startswith("fp8")},
            )
            add = attach_adapter(adapter_of(recipe), few, recipe.parallel)

            def attach(chunks: list[Any], place: Topology, add: Attach | None = add) -> None:
                if add is not None:
                    add(chunks, place)
                algorithm.attach_heads(recipe, chunks, place)

            built[stage] = parameters_of_stage(
                plain, few, topology, attach, times=setup.layers // setup.vpp)
    return {stage: built[stage if stage in built else 1] for stage in range(setup.pp)}


def activations_of(setup: Setup) -> PerToken:
    """What a token of a microbatch keeps, with the recipe's recomputation."""
    parallel, overrides = setup.recipe.parallel, setup.recipe.model.overrides
    kept = {k: v for k, v in overrides.items() if k.startswith("recompute")}
    return _profile(
        _Same(setup.arch), setup.recipe.precision, tuple(sorted(kept.items(), key=str)).__repr__(),
        _Same(kept), setup.tp, setup.ep, parallel.sequence_parallel, setup.lean,
        adapter_of(setup.recipe),
    )


def adapter_of(recipe: Recipe) -> AdapterConfig | None:
    """What is trained alone, if anything is."""
    return recipe.adapter if recipe.adapter.enabled else None


class _Same:
    """A value that takes no part in what a cache compares, but by its name."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.name = repr(getattr(value, "transformer", "")) + repr(getattr(value, "family", ""))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


@functools.lru_cache(maxsize=256)
def _profile(
    arch: _Same, precision: Any, named: str, overrides: _Same, tp: int, ep: int,
    sequence_parallel: bool, lean: bool, adapter: AdapterConfig | None,
) -> PerToken:
    del named  # the overrides, as text
    return per_token(
        arch.value, precision, overrides.value, tp=tp, ep=ep, sequence_parallel=sequence_parallel,
        lean=lean, lengths=PROFILE_TOKENS, adapter=adapter,
    )


def _files(setup: Setup, stages: tuple[StageMemory, ...], work: Workload) -> dict[str, float]:
    """Bytes on disk: a checkpoint, the exported folder, a round of the bank."""
    elements = sum(stage.parameters for stage in stages) * setup.tp
    trained = sum(stage.trainable for stage in stages) * setup.tp
    found = {"checkpoint": trained * checkpoint_bytes(setup.recipe),
             "hf": elements * float(element_size(setup.recipe))}
    if setup.recipe.adapter.enabled:
        found["adapter"] = trained * float(element_size(setup.recipe))
    if work.samples:
        lengths = work.lengths
        a_pair = 4 * (lengths.prompt.mean() + lengths.response.mean()) + 8 * lengths.sample.mean()
        found["pairs of a round"] = work.samples * float(a_pair)
    return found


def with_parallel(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other values in ``parallel``."""
    return replace(recipe, parallel=replace(recipe.parallel, **changes))
