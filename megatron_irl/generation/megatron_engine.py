"""Generation with Megatron's dynamic engine (continuous batching, paged KV cache) on the policy.

The engine runs on the very module that trains: no copy of the weights, no refit.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from megatron_irl import hardware
from megatron_irl.collector import no_collection
from megatron_irl.compat import attention_kernels
from megatron_irl.errors import UserError
from megatron_irl.generation.borrow import borrow
from megatron_irl.generation.cache_size import default_block_tokens
from megatron_irl.generation.engine import BURST_STEPS, BuiltEngine, EngineOptions
from megatron_irl.generation.graphs import why_not_captured
from megatron_irl.generation.intake import steps
from megatron_irl.generation.interface import Ends, Finished, Progress, SamplingConfig
from megatron_irl.generation.requests import RequestTable
from megatron_irl.generation.residency import KeepCache, Residency
from megatron_irl.generation.sampler import TableSampler
from megatron_irl.hardware import paged_attention
from megatron_irl.parallel.topology import Topology
from megatron_irl.types import Sample


class MegatronGenerator:
    """A ``Generator`` on the training model; see ``interface.Generator`` for ``generate``.

    The cache is allocated by the first ``generate`` and freed by ``close()``, by ``pause()`` where
    it may not stay, or at the end of a ``with`` block; ``generate`` may be called again after all
    of them.

    Args:
        chunks: This rank's model chunks as trained (any Megatron wrapper), one per virtual
            pipeline stage.
        max_sequence_length: Longest prompt plus response, in tokens.
        vocab_size: Ids from here on (vocabulary padding) are never sampled.
        max_requests: Requests decoded together; rounded up to the tensor-parallel size.
        kv_cache_gb: Cache size of this rank in GiB. By default, room for ``max_requests``
            sequences of full length. With less, fewer requests run together.
        block_tokens: Cache block length; see ``default_block_tokens``.
        cuda_graphs: ``auto`` captures decode steps where that is possible, ``off`` never, a number
            so many batch sizes at most.
        keep_cache: Whether ``pause`` leaves cache and graphs in memory; see ``Residency``.
        share_prompts: Requests with equal prompts compute the whole blocks of their cache once.
        burst_steps: Decode steps between two looks by the host.

    Collectives: construction has none; ``generate`` and ``pause`` run over the model-parallel
    group.

    Example:
        ::

            with MegatronGenerator(chunks, topology, max_sequence_length=512,
                                   vocab_size=arch.vocab_size) as generator:
                [sample] = generator.generate([prompt_ids], SamplingConfig(max_new_tokens=64))
            sample.token_ids, sample.logprobs, sample.finish_reason
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
        cuda_graphs: str | int = "auto",
        keep_cache: KeepCache = "auto",
        share_prompts: bool = False,
        burst_steps: int = BURST_STEPS,
    ) -> None:
        attention_kernels.install()
        self._chunks, self._topology = list(chunks), topology
        self._max_sequence_length = max_sequence_length
        self._asked_graphs = cuda_graphs
        self._options = EngineOptions(
            max_sequence_length=max_sequence_length,
            max_requests=math.ceil(max_requests / topology.tp_size) * topology.tp_size,
            kv_cache_gb=kv_cache_gb,
            block_tokens=block_tokens or default_block_tokens(max_sequence_length),
            share_prompts=share_prompts,
            burst_steps=burst_steps,
        )
        self._sampler = TableSampler(vocab_size, hardware.device())
        self._built: BuiltEngine | None = None
        self._capture_seconds = self._host_seconds = 0.0
        self.graphs_used = 0  # captured for the last engine, which may be gone
        self.residency = Residency(keep_cache, topology)

    def __enter__(self) -> "MegatronGenerator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> Any:
        """Megatron's engine, or None while there is none."""
        return self._built.engine if self._built else None

    @property
    def graph_count(self) -> int:
        """CUDA graphs of the engine's steps captured at present."""
        return self._built.graph_count if self._built else 0

    def costs(self) -> dict[str, Any]:
        """What generation cost beside its time, on this rank; nothing on CPU.

        ``graphs``; since this was asked last ``capture_seconds`` and ``host_seconds``, in which the
        device had nothing to do between two bursts of decode steps; and in GiB the most memory that
        tensors took in the last phase of generation and in the training before it.
        """
        if not hardware.IS_CUDA:
            return {}
        capturing, waiting = self._capture_seconds, self._host_seconds
        self._capture_seconds = self._host_seconds = 0.0
        peaks = {"generation": self.residency.peak_generation, "train": self.residency.peak_train}
        return {
            "graphs": self.graphs_used, "capture_seconds": capturing, "host_seconds": waiting,
            **{f"memory/peak_{name}": peak / 2**30 for name, peak in peaks.items() if peak},
        }

    def pause(self) -> None:
        """End a phase of generation; see ``interface.Generator.pause``."""
        if not self.residency.end_generation():
            self.close()

    def close(self) -> None:
        """Free the KV cache, the graphs and the engine."""
        built, self._built = self._built, None
        if built is not None:
            built.release()
            hardware.release_cached_memory()

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        on_progress: Progress | None = None,
        *,
        keys: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        max_new_tokens: Sequence[int] | None = None,
        on_finished: Finished | None = None,
        ends: Ends | None = None,
    ) -> list[Sample]:
        """One response per prompt, in order; see ``interface.Generator.generate``."""
        count = len(prompts)
        budgets = list(max_new_tokens or itertools.repeat(sampling.max_new_tokens, count))
        self._check(prompts, budgets)
        seeds = [sampling.seed] * count if seeds is None else seeds
        streams = list(zip(seeds, range(count) if keys is None else keys, strict=True))
        self.residency.begin_generation()
        with borrow(self._chunks) as models:
            if not prompts:  # not before borrowing, which may be collective over data parallelism
                return []
            if self._built is None:
                self._build(models)
            assert self._built is not None
            table = self._sampler.table = RequestTable(sampling, budgets, streams, ends)
            try:
                with self._built.lent(), no_collection():
                    return self._run(self._built, prompts, table, on_progress, on_finished)
            except BaseException:
                self.close()  # requests in flight would haunt the next call
                raise

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

    def _build(self, models: list[Any]) -> None:
        graphs = self._asked_graphs
        number = None
        if graphs != "off" and not why_not_captured(models, paged_attention.has_flash_attention()):
            number = -1 if graphs == "auto" else int(graphs)
        # Training's cached blocks would be too small or too many for one large cache.
        hardware.release_cached_memory()
        before = hardware.held_memory()
        self._built = BuiltEngine(
            models, self._topology, self._sampler, replace(self._options, cuda_graphs=number)
        )
        self._capture_seconds += self._built.capture_seconds
        self.graphs_used = self._built.graph_count
        self.residency.cache_bytes = hardware.held_memory() - before

    def _run(
        self, built: BuiltEngine, prompts: Sequence[np.ndarray], table: RequestTable,
        on_progress: Progress | None, on_finished: Finished | None,
    ) -> list[Sample]:
        samples: list[Any] = [None] * len(prompts)
        finished = 0
        for ended in steps(built.engine, built.loop, prompts, table):
            for request in ended:
                samples[request] = table.finish(request)
                if on_finished is not None:
                    on_finished(request, samples[request])
            finished += len(ended)
            if on_progress is not None:
                on_progress(finished, table.token_count)
        self._host_seconds += built.loop.take_host_seconds()
        return samples
