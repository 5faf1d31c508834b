"""How the ranks of a pipeline generate: stage after stage, or each as a replica of its own."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from megatron_irl import hardware
from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture
from megatron_irl.generation.borrow import complete_gather
from megatron_irl.generation.cache_size import GIB, cache_gb, default_block_tokens
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.generation.residency import SPARE
from megatron_irl.parallel.agreement import agree
from megatron_irl.parallel.topology import Topology
from megatron_irl.policy.whole_model import WholeModel
from megatron_irl.types import Sample

Pipeline = Literal["auto", "stages", "replicas"]


class PolicyGenerator:
    """A ``Generator`` on the policy's chunks, which in a pipeline chooses how its stages work.

    ``stages`` is one engine over all stages, of which one computes while the others wait.
    ``replicas`` is an engine on every stage, on all layers (``WholeModel``), with requests of its
    own: no stage waits, at the price of memory for the other stages' weights and their cache.

    Args:
        pipeline: ``auto`` takes replicas where every rank of the run has the memory.
        unmerged: The chunks have adapters that are sampled from as they are.
        options: As ``MegatronGenerator``.

    Attributes:
        residency: Of the engines.
        choice: For the record, what ``generation.pipeline`` came to in the last phase, and why;
            None before there was one, and without a pipeline.

    Collectives: without a pipeline none but the engine's.
    """

    def __init__(
        self, chunks: Sequence[Any], topology: Topology, architecture: Architecture, *,
        pipeline: Pipeline = "auto", unmerged: bool = False, **options: Any,
    ) -> None:
        self._chunks, self._topology, self._architecture = list(chunks), topology, architecture
        self._pipeline, self._unmerged, self._options = pipeline, unmerged, options
        self._stages = self._active = MegatronGenerator(chunks, topology, **options)
        self.residency = self._stages.residency
        self._whole: WholeModel | None = None
        self._holds = False  # the whole model's weights
        self._chosen: Topology | None = None
        self.choice: dict[str, str] | None = None
        self._note = ""
        self._said: set[str] = set()

    @property
    def engine(self) -> Any:
        """Megatron's engine, or None while there is none."""
        return self._active.engine

    @property
    def graph_count(self) -> int:
        """CUDA graphs of the engine's steps captured at present."""
        return self._active.graph_count

    def ranks(self) -> Topology:
        """This rank's place as generation has it, from now on until ``pause``.

        In a pipeline memory is measured for it, and taken. Collective over every rank of the run.

        Raises:
            UserError: Replicas were asked for and cannot be, on every rank.
        """
        if self._chosen is None:
            self._chosen = self._topology
            if self._topology.pp_size > 1:
                if self._pipeline != "stages":
                    self._chosen = self._choose()
                taken = "stages" if self._active is self._stages else "replicas"
                self.choice = {"asked": self._pipeline, "taken": taken, "note": self._note}
        return self._chosen

    def take_note(self) -> str | None:
        """What was chosen and why, the first time; sizes may differ from phase to phase."""
        kind = self._note.partition("(")[0]
        if kind in self._said or not kind:
            return None
        self._said.add(kind)
        return self._note

    def generate(
        self, prompts: Sequence[np.ndarray], sampling: SamplingConfig, *others: Any, **options: Any
    ) -> list[Sample]:
        """As ``Generator.generate``, of a replica that ``ranks`` tells of.

        Collectives: as ``ranks``, and over the pipeline, which hands weights round.
        """
        self.ranks()
        if self._holds:
            assert self._whole is not None
            complete_gather(self._chunks)
            self._whole.refresh()  # every time: who changes weights need not say so
        return self._active.generate(prompts, sampling, *others, **options)

    def costs(self) -> dict[str, Any]:
        """As ``MegatronGenerator.costs``; with how many replicas a pipeline was, if it was some."""
        found = self._active.costs()
        if self._active is not self._stages:
            found["replicas"] = self._topology.pp_size * self._topology.dp_size
        return found

    def pause(self) -> None:
        """End a phase of generation; see ``interface.Generator.pause``."""
        self._chosen = None
        if not self.residency.end_generation():
            self.close()

    def close(self) -> None:
        """Free cache, graphs, and what is held of other stages' weights."""
        self._chosen = None
        self._stages.close()
        self._free()

    def _free(self) -> None:
        self._active.close()
        if self._whole is not None:
            self._whole.free()
        self._holds, self.residency.weight_bytes = False, 0

    def _choose(self) -> Topology:
        """Replicas if they are wanted and all ranks can, else stages."""
        self.residency.begin_generation()  # what was held most up to here is training's
        if self._whole is None:
            self._whole = WholeModel(self._chunks, self._topology, self._architecture)
        reason = self._why_not(self._whole) or self._take(self._whole)
        if reason is None:
            gib = self._whole.nbytes / GIB
            self._note = (
                f"generation: each of the {self._topology.pp_size} stages samples by itself, on a "
                f"copy of the others' weights ({gib:.2g} GiB a rank)"
            )
            return self._whole.topology
        if self._active is not self._stages:
            self._free()
            self._active = self._stages
        if self._pipeline == "replicas":
            raise UserError(
                f"generation.pipeline=replicas cannot be: {reason}. Set it to auto or stages, or "
                "free memory (generation.offload_optimizer, generation.kv_cache_gb)."
            )
        self._note = f"generation: the stages of the pipeline decode in turn, because {reason}"
        return self._topology

    def _why_not(self, whole: WholeModel) -> str | None:
        """Why the other stages' weights shall not be taken; the same on every rank. Collective."""
        refused = whole.why_not()
        if self._unmerged:
            refused = "adapters are sampled from without being merged"
        cache = shortage = 0
        try:
            cache = self._cache_bytes(whole)
        except UserError:
            refused = "generation.kv_cache_gb has no room for a sequence in all layers"
        if not self._holds and self._pipeline == "auto":
            shortage = missing(
                whole.nbytes, cache, free=hardware.free_memory(), total=hardware.total_memory()
            )
        # One replica's ranks hold other weights than another's, and machines differ. All decide
        # alike, because samples are dealt over all of them.
        is_refused, shortage = agree([refused is not None, shortage], self._topology)
        if is_refused:
            return refused or "another rank's weights are kept in 8 bits"
        if shortage:
            return (
                f"the other stages' weights ({whole.nbytes / GIB:.2g} GiB here) and a cache of all "
                f"layers ({cache / GIB:.2g} GiB) need {shortage / GIB:.2g} GiB more than is free"
            )
        return None

    def _take(self, whole: WholeModel) -> str | None:
        """Allocate the other stages' weights; returns why that failed. Collective."""
        failure = None
        try:
            if not self._holds:
                self._stages.close()  # where its cache has stayed
                hardware.release_cached_memory()
                chunks = whole.allocate()
                if self._active is self._stages:
                    self._active = MegatronGenerator(chunks, whole.topology, **self._options)
                    self._active.residency = self.residency
        except (RuntimeError, MemoryError) as error:
            failure = str(error).split("\n")[0]
        if agree([failure is not None], self._topology)[0]:
            if not self._holds:
                whole.free()  # what there was memory for
            return f"their weights could not be allocated ({failure or 'on another rank'})"
        self._holds, self.residency.weight_bytes = True, whole.nbytes
        return None

    def _cache_bytes(self, whole: WholeModel) -> int:
        length = self._options["max_sequence_length"]
        size = cache_gb(
            whole.config, max_sequence_length=length,
            max_requests=self._options.get("max_requests", 64),
            block_tokens=self._options.get("block_tokens") or default_block_tokens(length),
            kv_cache_gb=self._options.get("kv_cache_gb"),
        )
        return int(size * GIB)


def missing(weights: int, cache: int, *, free: int, total: int) -> int:
    """Bytes that are missing for the other stages' weights and a cache of all layers, or 0.

    Args:
        free, total: Bytes of the device; a share of the total is left for what is not counted.
    """
    return max(0, weights + cache + int(SPARE * total) - free)
