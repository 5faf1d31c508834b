"""Generation with Megatron's dynamic engine (continuous batching, paged KV cache) on the policy.

The engine runs on the very module that trains: no copy of the weights, no refit.
"""

import faulthandler
import itertools
import math
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_irl import hardware
from megatron_irl.errors import UserError
from megatron_irl.generation.borrow import borrow
from megatron_irl.generation.cache_size import cache_gb, default_block_tokens
from megatron_irl.generation.context import PagedContext
from megatron_irl.generation.interface import Progress, SamplingConfig
from megatron_irl.generation.pipeline import StageWrapper
from megatron_irl.generation.sampling import KeyedSampler
from megatron_irl.hardware import paged_attention
from megatron_irl.parallel.topology import Topology
from megatron_irl.types import Sample

from megatron.core.inference.config import InferenceConfig  # isort: skip
from megatron.core.inference.engines import DynamicInferenceEngine  # isort: skip
from megatron.core.inference.sampling_params import SamplingParams  # isort: skip
from megatron.core.inference.text_generation_controllers.text_generation_controller import (  # isort: skip  # noqa: E501
    TextGenerationController,
)

# Importing the engine makes SIGTERM and SIGINT dump a stack; ending a run is no crash.
for _number in (signal.SIGTERM, signal.SIGINT):
    faulthandler.unregister(_number)


class _Controller(TextGenerationController):
    """The engine's step, with our sampler and any number of stop ids; token ids only, no text."""

    def __init__(self, wrapper: StageWrapper, sampler: KeyedSampler) -> None:
        super().__init__(wrapper, tokenizer=None)
        self._sampling = sampler

    def detokenize(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return ""

    def _apply_stop_word_finished_ids(self, request_ids: Tensor, active_mask: Tensor) -> None:
        # The engine compares with one termination id per request; this hook runs right after.
        del request_ids
        active_mask[torch.from_numpy(self._sampling.stopped)] = 0


class MegatronGenerator:
    """A ``Generator`` on the training model; see ``interface.Generator`` for ``generate``.

    The cache is allocated by the first ``generate`` and freed by ``close()`` or at the end of a
    ``with`` block; ``generate`` may be called again after ``close``.

    Args:
        chunks: This rank's model chunks as trained (any Megatron wrapper), one per virtual
            pipeline stage.
        max_sequence_length: Longest prompt plus response, in tokens.
        vocab_size: Ids from here on (vocabulary padding) are never sampled.
        max_requests: Requests decoded together; rounded up to the tensor-parallel size.
        kv_cache_gb: Cache size of this rank in GiB. By default, room for ``max_requests``
            sequences of full length. With less, fewer requests run together.
        block_tokens: Cache block length; see ``default_block_tokens``.

    Collectives: construction has none; ``generate`` runs over the model-parallel group.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        topology: Topology,
        *,
        max_sequence_length: int,
        vocab_size: int,
        max_requests: int = 64,
        kv_cache_gb: float | None = None,
        block_tokens: int | None = None,
    ) -> None:
        self._chunks, self._topology = list(chunks), topology
        self._max_sequence_length = max_sequence_length
        self._max_requests = math.ceil(max_requests / topology.tp_size) * topology.tp_size
        self._block_tokens = block_tokens or default_block_tokens(max_sequence_length)
        self._kv_cache_gb = kv_cache_gb
        self._sampler = KeyedSampler(vocab_size, hardware.device())
        self._engine: DynamicInferenceEngine | None = None
        paged_attention.install()

    def __enter__(self) -> "MegatronGenerator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the KV cache and the engine."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.context.release()
            hardware.release_cached_memory()

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        on_progress: Progress | None = None,
        *,
        keys: Sequence[int] | None = None,
        max_new_tokens: Sequence[int] | None = None,
    ) -> list[Sample]:
        """One response per prompt, in order; see ``interface.Generator.generate``."""
        budgets = list(max_new_tokens or itertools.repeat(sampling.max_new_tokens, len(prompts)))
        self._check(prompts, budgets)
        keys = range(len(prompts)) if keys is None else keys
        self._sampler.begin(sampling, [len(p) for p in prompts], budgets, keys)
        with borrow(self._chunks) as models:
            if not prompts:  # not before borrowing, which may be collective over data parallelism
                return []
            if self._engine is None:
                self._engine = self._build_engine(models)
            try:
                self._run(self._engine, prompts, budgets, on_progress)
            except BaseException:
                self.close()  # requests in flight would haunt the next call
                raise
        return [self._sample(row) for row in range(len(prompts))]

    def _check(self, prompts: Sequence[np.ndarray], budgets: Sequence[int]) -> None:
        for index, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
            if len(prompt) == 0:
                raise UserError(f"prompt {index} is empty; every prompt needs at least one token.")
            if len(prompt) + budget > self._max_sequence_length:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens, which conflicts with "
                    f"generation.max_new_tokens={budget}; together they may not exceed "
                    f"{self._max_sequence_length} tokens. Lower generation.max_new_tokens or "
                    "data.max_prompt_length."
                )

    def _build_engine(self, models: list[Any]) -> DynamicInferenceEngine:
        config = InferenceConfig(
            block_size_tokens=self._block_tokens,
            buffer_size_gb=cache_gb(  # pyright: ignore[reportArgumentType]
                models[0].config, max_sequence_length=self._max_sequence_length,
                max_requests=self._max_requests, block_tokens=self._block_tokens,
                kv_cache_gb=self._kv_cache_gb,
            ),
            max_requests=self._max_requests,
            # Steps are padded to the rounding, so a limit in between would be overrun.
            max_tokens=PagedContext.round_up_tokens(
                max(4096, self._max_sequence_length, self._max_requests), self._topology.tp_size
            ),
            max_sequence_length=self._max_sequence_length,
            pg_collection=self._topology.groups,
            unified_memory_level=0,
            num_cuda_graphs=None,
            use_cuda_graphs_for_non_decode_steps=False,
            materialize_only_last_token_logits=True,
        )
        context = PagedContext(models[0].config, config)
        context.map_layers([layer for model in models for layer in model.decoder.layers])
        wrapper = StageWrapper(models, context)
        return DynamicInferenceEngine(_Controller(wrapper, self._sampler), context)

    def _run(
        self, engine: DynamicInferenceEngine, prompts: Sequence[np.ndarray],
        budgets: Sequence[int], on_progress: Progress | None,
    ) -> None:
        for request, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
            ids = torch.as_tensor(np.asarray(prompt, dtype=np.int64), device=hardware.device())
            # Sampling is the sampler's business; stopping by id is the controller's.
            params = SamplingParams(num_tokens_to_generate=int(budget), termination_id=-1)
            engine.add_request(request, ids, params)
        finished = 0
        while engine.has_unfinished_requests():
            done: Any = engine.step_modern()
            finished += len(done["finished_request_records"])
            if on_progress is not None:
                on_progress(finished, int(self._sampler.lengths.sum()))

    def _sample(self, row: int) -> Sample:
        length = int(self._sampler.lengths[row])
        tokens = self._sampler.tokens[row, :length].copy()
        stopped = int(tokens[-1]) in self._sampler.sampling.stop_set
        return Sample(
            tokens, self._sampler.logprobs[row, :length].copy(), "stop" if stopped else "length"
        )
