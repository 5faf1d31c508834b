"""Building Megatron's dynamic engine on a lent model: cache, context, controller and graphs."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_irl import hardware
from megatron_irl.compat.engine_manners import no_progress_bar
from megatron_irl.compat.replaced import replaced
from megatron_irl.generation.cache_size import (
    cache_gb,
    mixed_graph_tokens,
    step_tokens,
    tokens_to_all_experts,
)
from megatron_irl.generation.context import PagedContext
from megatron_irl.generation.decode import DecodeLoop
from megatron_irl.generation.graphs import LayerGraphs
from megatron_irl.generation.pipeline import StageWrapper
from megatron_irl.generation.sampler import TableSampler
from megatron_irl.parallel.agreement import any_of_replica
from megatron_irl.parallel.topology import Topology, without_expert_parallelism

from megatron.core.inference.batch_dimensions_utils import (  # isort: skip
    InferenceBatchDimensions,
)
from megatron.core.inference.config import InferenceConfig  # isort: skip
from megatron.core.inference.engines import DynamicInferenceEngine  # isort: skip
from megatron.core.inference.text_generation_controllers.text_generation_controller import (  # isort: skip  # noqa: E501
    TextGenerationController,
)

BURST_STEPS = 32 if hardware.IS_CUDA else 1  # on CPU a row that has ended costs a row's work


@dataclass(frozen=True)
class EngineOptions:
    """What shapes an engine.

    Attributes:
        max_sequence_length: Longest prompt plus response, in tokens.
        max_requests: Requests decoded together, a multiple of the tensor-parallel size.
        kv_cache_gb: Cache size of this rank in GiB; None: room for all requests at full length.
        block_tokens: Length of a block of the cache.
        cuda_graphs: How many graphs to capture; None: decode without, -1: as many as Megatron
            thinks right (one per halving of ``max_requests``).
        share_prompts: Equal prompts share the whole blocks of their cache.
        burst_steps: Longest burst of decode steps between two looks by the host.
    """

    max_sequence_length: int
    max_requests: int
    kv_cache_gb: float | None
    block_tokens: int
    cuda_graphs: int | None = None
    share_prompts: bool = False
    burst_steps: int = BURST_STEPS


class Controller(TextGenerationController):
    """The engine's step, with our sampler and any number of stop ids; token ids only, no text."""

    def __init__(self, wrapper: StageWrapper, sampler: TableSampler) -> None:
        # Upstream refuses graphs of ranks with experts of their own, whose dispatcher asks the
        # host; the steps that are captured here go to all experts (``every_expert``).
        with replaced((wrapper.config, "expert_model_parallel_size", 1)):
            super().__init__(wrapper, tokenizer=None)
        self._sampling = sampler

    def detokenize(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return ""

    def _apply_stop_word_finished_ids(self, request_ids: Tensor, active_mask: Tensor) -> None:
        # The engine compares with one termination id per request; this hook runs right after.
        del request_ids
        active_mask[torch.from_numpy(self._sampling.stopped)] = 0


class BuiltEngine:
    """An engine on ``models``, which must be lent while it is built and whenever it is used.

    Attributes:
        engine: Megatron's.
        loop: Its decode steps in bursts.
        capture_seconds: What capturing took; 0 without graphs.

    Collectives: building is collective over the model-parallel group.
    """

    def __init__(
        self, models: list[Any], topology: Topology, sampler: TableSampler, options: EngineOptions
    ) -> None:
        self._models, self._topology, self._sampler = models, topology, sampler
        self._options = options
        self.graphs: LayerGraphs | None = None
        self.capture_seconds = 0.0
        if options.cuda_graphs is not None:
            self._build_with_graphs()
        if self.graphs is None:
            self.engine = self._build(None)
        self.loop = DecodeLoop(
            self.engine, topology, steps=options.burst_steps, vocab_size=sampler.vocab_size,
            device=sampler.device, captured=self.graphs is not None,
        )

    @property
    def graph_count(self) -> int:
        """Graphs of the layers that decoding can replay."""
        return self.graphs.count if self.graphs else 0

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block the models' decode steps replay the graphs, if there are any."""
        if self.graphs is None:
            yield
            return
        with self.graphs.lent():
            yield

    def release(self) -> None:
        """Free cache and graphs, whatever reference cycles the engine leaves behind."""
        del self.loop  # its captured sampling holds memory of the pool
        if self.graphs is not None:
            self.graphs.drop()
        self.engine.context.release()
        self.engine.controller._all_logits_cuda = None

    def _build_with_graphs(self) -> None:
        graphs, start = LayerGraphs(self._models), time.perf_counter()
        error = self._capture(graphs)
        # Steps that are captured are padded, so the ranks of a replica must run one kind.
        if not any_of_replica(error is not None, self._topology):
            hardware.synchronize()  # the clock is the host's, and capturing queues work
            self.capture_seconds = time.perf_counter() - start
            self.graphs = graphs
            return
        graphs.drop()
        if error is None:
            self.engine.context.release()
        hardware.release_cached_memory()
        reason = str(error).split("\n")[0] if error else "another rank of the replica says why."
        warnings.warn(
            "decoding runs without CUDA graphs, several times slower, because capturing them "
            f"failed: {reason} Set generation.cuda_graphs=off to decode so from the start, or "
            "lower generation.max_requests or generation.kv_cache_gb if memory ran out.",
            stacklevel=2,
        )

    def _capture(self, graphs: LayerGraphs) -> Exception | None:
        """Build the engine with graphs; or what a kernel or a capture does not like."""
        try:
            with graphs.lent():
                self.engine = self._build(self._options.cuda_graphs)
        except (RuntimeError, AssertionError) as error:
            # Out of memory and CUDA's own errors are RuntimeErrors, Megatron's refusals assertions.
            return error
        return None

    def _build(self, cuda_graphs: int | None) -> DynamicInferenceEngine:
        options, models, tp_size = self._options, self._models, self._topology.tp_size
        config = InferenceConfig(
            block_size_tokens=options.block_tokens,
            buffer_size_gb=cache_gb(  # pyright: ignore[reportArgumentType]
                models[0].config, max_sequence_length=options.max_sequence_length,
                max_requests=options.max_requests, block_tokens=options.block_tokens,
                kv_cache_gb=options.kv_cache_gb,
            ),
            max_requests=options.max_requests,
            # Steps are padded to the rounding, so a limit in between would be overrun.
            max_tokens=PagedContext.round_up_tokens(
                max(
                    step_tokens(models[0].config), options.max_sequence_length,
                    options.max_requests,
                ),
                tp_size,
            ),
            max_sequence_length=options.max_sequence_length,
            pg_collection=without_expert_parallelism(self._topology),
            unified_memory_level=0,  # the cache in device memory, which ``release`` gives back
            num_cuda_graphs=cuda_graphs,
            use_cuda_graphs_for_non_decode_steps=False,
            materialize_only_last_token_logits=True,
            # Blocks lose their hash with their last reader, so none outlives a change of weights.
            enable_prefix_caching=options.share_prompts,
        )
        context = PagedContext(models[0].config, config)
        context.map_layers(models)
        if cuda_graphs is not None:
            self._add_mixed_graphs(context)
            _drop_what_asks_the_host(context, models[0].config)
        wrapper = StageWrapper(models, context, fixed_buffers=cuda_graphs is not None)
        with no_progress_bar():
            return DynamicInferenceEngine(Controller(wrapper, self._sampler), context)

    def _add_mixed_graphs(self, context: PagedContext) -> None:
        """Ask for graphs of steps with prompts as well, by total tokens alone.

        Megatron's own grid is over tokens and prompts, and large. A place for a prompt can hold a
        decoding request too, so a graph all of whose places are for prompts serves any mixture.
        """
        config, places = self._models[0].config, context.max_requests
        for tokens in mixed_graph_tokens(config, places, context.max_tokens):
            size = InferenceBatchDimensions(tokens, places, 0)
            # Capturing fills the places evenly, and no place holds more than a whole sequence.
            if size.is_valid(places, context.max_sequence_length, 0):
                # Largest first, which Megatron's capture expects of its list.
                context.cuda_graph_batch_dimensions_list.insert(0, size)


def _drop_what_asks_the_host(context: PagedContext, config: Any) -> None:
    """Ask for no graphs of steps so large that experts get their tokens by the host's count."""
    if config.num_moe_experts:
        sizes, most = context.cuda_graph_batch_dimensions_list, tokens_to_all_experts(config)
        sizes[:] = [size for size in sizes if size.token_count <= most]
