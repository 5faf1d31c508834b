"""Decoding in bursts: several steps on the device between two looks by the host.

Megatron's engine does its bookkeeping on the host after every token. A burst does the same
bookkeeping on the device, step by step, and hands the engine the sum of it. Its first step may
take prompts up. A cache that is full and requests that wait for room in it stay the engine's own
steps.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_irl.generation.device_steps import DeviceSteps
from megatron_irl.generation.requests import RequestTable
from megatron_irl.parallel.topology import Topology


class DecodeLoop:
    """Bursts of steps on an engine's context.

    Args:
        engine: Megatron's dynamic engine.
        steps: Longest burst. With 1 the host decides after every token.
        captured: The layers run as CUDA graphs, and the sampling shall too.

    Attributes:
        burst_steps: As ``steps``.

    Collectives: ``run`` runs over the model-parallel group, whose ranks hold equal requests and so
    take equal decisions.
    """

    def __init__(
        self, engine: Any, topology: Topology, *, steps: int, vocab_size: int,
        device: torch.device, captured: bool,
    ) -> None:
        self._engine, self._topology, self.burst_steps = engine, topology, steps
        self._context, self._controller = engine.context, engine.controller
        self._captured = captured
        self._device = DeviceSteps(
            self._context, rows=self._context.max_requests, steps=steps, vocab_size=vocab_size,
            device=device, capture=captured and topology.pp_size == 1,
        )
        self._host_seconds = 0.0
        self._done_at: float | None = None  # when the device had finished the last burst
        # Of the last burst, what the engine has to be told: requests [B], tokens [K, B] and counts
        # [B], and a step's result and state in the engine's form.
        self._untold: tuple[
            tuple[Tensor, np.ndarray, np.ndarray], dict[str, Any], dict[str, Any]
        ] | None = None

    def ready(self) -> bool:
        """Whether there are requests, and none of them waits for room in the cache."""
        context = self._context
        return (
            context.total_request_count > 0
            and context.paused_request_count == 0
            and context.chunked_prefill_request_id == -1
        )

    @torch.inference_mode()
    def run(
        self, table: RequestTable, *, wanted: int | None, single: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[int]:
        """One burst: take up the context's new prompts, and decode.

        Args:
            wanted: Stop at the latest when so many requests have used their budgets up; None where
                nobody waits for their places.
            single: Stop after one step.
            meanwhile: The host's work for while the device decodes.

        Returns:
            The requests that have ended.
        """
        context = self._context
        rows, prompts = context.total_request_count, context.num_prefill_requests > 0
        ids_B = context.request_ids[:rows].long()  # a copy: the update below moves rows about
        requests = ids_B.tolist()
        left_B = table.left(requests)
        self._device.choose(table.sampling)
        steps = self._reserve(left_B, 1 if single else self._length(left_B, wanted))
        input_ids, position_ids, published = self._controller._dynamic_step_context_init(
            record_bookkeeping_done_event=True  # which leaves the copy to the device in flight
        )
        if self._done_at is not None:
            self._host_seconds += time.perf_counter() - self._done_at
        for step in range(steps):
            if step == 1 and prompts:
                published.synchronize()  # it copies from what is written next
                input_ids, position_ids = self._leave_prompts(left_B)
            elif step:
                # ``advance`` has moved the device's view of the step on; the views of it that the
                # layers share are made anew, without a look at its numbers.
                context.follow_device()
            logits_BV = self._forward(input_ids, position_ids)
            if step == 0:  # with the device at work already
                self._device.begin(table.uniforms(requests, steps), left_B)
            self._sample(logits_BV)
            del logits_BV  # large, and the next step makes its own
        # Before the wait: on CUDA all of the burst is only queued by now.
        self.tell_engine()
        meanwhile()
        tokens, logprobs, was_live, live_B = self._device.collect(steps, rows)
        self._done_at = time.perf_counter()
        counts = was_live.sum(axis=0)
        table.record(requests, tokens, logprobs, counts)
        live_B = live_B & ~table.has_ended(requests)
        followed = 2 if prompts else 1  # steps that the host's tensors have seen
        self._settle(ids_B, tokens, counts, torch.from_numpy(live_B), unseen=steps - followed)
        return [request for request, live in zip(requests, live_B, strict=True) if not live]

    def _length(self, left_B: np.ndarray, wanted: int | None) -> int:
        if self.burst_steps == 1:
            return 1
        if wanted is None:
            return int(min(self.burst_steps, left_B.max()))
        # A stop id may end a request at any step, and somebody waits for its place.
        longest = max(1, self.burst_steps // 2)
        wanted = min(wanted, len(left_B))
        return int(min(longest, np.partition(left_B, wanted - 1)[wanted - 1]))

    def _reserve(self, left_B: np.ndarray, steps: int) -> int:
        """Give each row the cache blocks of the burst; fewer steps where there are not enough."""
        context = self._context
        if steps == 1:
            return 1  # the engine has seen to the next position
        length, rows = context.block_size_tokens, len(left_B)
        # Where the first step writes last: a prompt's end, or the one token of a request.
        first_B = (
            context.request_kv_length_offsets[:rows] + context.request_query_lengths[:rows] - 1
        ).numpy()
        have_B = context.request_kv_block_counts[:rows].numpy()
        allocator = context.kv_block_allocator
        room = min(allocator.total_avail, allocator.get_active_avail())
        # The host's numbers, which are equal on all ranks of a replica, so they shorten alike:
        # bursts of different length would leave a rank alone in a layer's collective.
        need_B = np.zeros(rows, dtype=np.int64)
        while steps > 1:
            last_B = first_B + np.minimum(steps, left_B) - 1
            need_B = np.maximum(last_B // length + 1 - have_B, 0)
            if need_B.sum() <= room:
                break
            steps //= 2
        if steps > 1 and need_B.any():
            blocks = allocator.allocate_memory_blocks(int(need_B.sum()))
            taken = 0
            for row in np.flatnonzero(need_B):
                have, more = int(have_B[row]), int(need_B[row])
                context.request_to_kv_block_ids[row, have : have + more] = blocks[
                    taken : taken + more
                ]
                taken += more
            context.request_kv_block_counts[:rows] += torch.from_numpy(need_B.astype(np.int32))
        return steps

    def _leave_prompts(self, left_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """Publish the layout of the step after one with prompts, while the device computes that.

        Nothing in it depends on what is sampled: the tokens are on the device, where ``advance``
        has put them, and a request that ended by its token is computed on, as in any burst.

        Returns:
            The views of token ids and positions, of the size of the new step.
        """
        context = self._context
        context.leave_prompts(left_B > 1)
        input_ids, position_ids, _ = self._controller._dynamic_step_context_init(
            transfer_bookkeeping_to_gpu=False
        )
        # Without a wait: what it copies from is not written to again before ``collect`` has waited.
        context.transfer_bookkeeping_to_gpu(skip_token_input_ids=True, record_done_event=True)
        return input_ids, position_ids

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
        """Queue one forward pass; on CUDA the host runs ahead of the device.

        Returns:
            Logits [B, V] on the last stage of a pipeline, None elsewhere.
        """
        logits_1BV = self._controller.inference_wrapped_model.run_one_forward_step(
            {"tokens": input_ids, "position_ids": position_ids, "attention_mask": None}
        )
        return None if logits_1BV is None else logits_1BV[0, : self._context.num_last_token_logits]

    def _sample(self, logits_BV: Any) -> None:
        """Queue the sampling of a step, from what ``_forward`` has returned."""
        if self._topology.pp_size > 1:
            # The last stage samples and tells the others tokens, not logits. float64 holds an id
            # and a float32 exactly, so one broadcast does for both. (Its source is counted among
            # the ranks of the run.)
            rows = self._context.num_last_token_logits
            told_2B = torch.empty(2, rows, dtype=torch.float64, device=self._device.device)
            if self._topology.is_last_stage:
                told_2B[0], told_2B[1] = self._device.sample(logits_BV)
            group = self._topology.pp_group
            dist.broadcast(told_2B, dist.get_process_group_ranks(group)[-1], group=group)
            self._device.advance(told_2B[0].long(), told_2B[1].float())
        elif self._captured and self._context.using_cuda_graph_this_step():
            # Captured sampling reads from one address.
            fixed_BV = self._controller._all_logits_cuda[0, : len(logits_BV)]
            self._device.step(fixed_BV.copy_(logits_BV))
        else:
            # A step with prompts that is not captured has any number of rows: nothing to record.
            self._device.advance(*self._device.sample(logits_BV))

    def _settle(
        self, ids_B: Tensor, tokens: np.ndarray, counts: np.ndarray, live_B: Tensor, *, unseen: int
    ) -> None:
        """Tell the context what the burst did, and keep it for the engine, as if by its own steps.

        Args:
            unseen: Positions that the device has moved on without the host's tensors.
        """
        context, (steps, rows) = self._context, tokens.shape
        last_B = torch.from_numpy(tokens[counts - 1, np.arange(rows)])
        if steps > 1:
            # Rows that have ended are released below, wherever they are said to be.
            context.request_kv_length_offsets[:rows] += unseen
            position_B = context.request_kv_length_offsets[:rows].long()
            length, width = context.block_size_tokens, context.request_to_kv_block_ids.shape[1]
            column_B1 = (position_B // length).clamp(max=width - 1)[:, None]
            context.request_last_kv_block_offset[:rows] = (position_B % length).int()
            context.request_last_kv_block_id[:rows] = (
                context.request_to_kv_block_ids[:rows].gather(1, column_B1)[:, 0]
            )
        state = {
            "kv_stats": None, "active_token_count": rows, "step_count": context.step_count,
            "chunked_prefill_request_id": -1,
        }
        updated = context.update_requests(live_B.byte(), last_B.clone()) or {}
        context.step_count += steps
        ended = ids_B[~live_B]
        result = {
            # To the engine, only those that have ended were in the step: it drops them. For the
            # others there is nothing left to do.
            "active_request_ids": ended, "finished_request_ids": ended,
            "sample": last_B[~live_B], "accepted_tokens": None, "log_probs": None,
            "cuda_graph_request_count": None, **updated,
        }
        # Lists are made of it when the device is at work again. A copy, as on a CPU the next burst
        # writes to where these tokens are.
        self._untold = ((ids_B, tokens.copy(), counts), result, state)
        if updated.get("evict_request_ids") is not None:
            self.tell_engine()  # it has to put them back into its queue

    def pause(self) -> None:
        """End a series of bursts; before a step of the engine's own, too."""
        self.tell_engine()
        self._done_at = None

    def take_host_seconds(self) -> float:
        """Time since this was asked last in which the device waited for the next burst."""
        seconds, self._host_seconds = self._host_seconds, 0.0
        return seconds

    def tell_engine(self) -> None:
        """Let the engine know of the last burst, if it does not yet.

        While the next burst runs, as a rule, when the host has time.
        """
        if self._untold is None:
            return
        ((ids_B, tokens, counts), result, state), self._untold = self._untold, None
        sampled = zip(ids_B.tolist(), tokens.T.tolist(), counts.tolist(), strict=True)
        for request, of_request, count in sampled:
            # The engine keeps tokens of its own: eviction turns them into a part of the prompt.
            self._engine.get_request(request).generated_tokens += of_request[:count]
        # ``async_bookkeep`` is upstream's private end of a step (0.19.2): there is no public one.
        self._engine._run_coroutine_sync(self._engine.async_bookkeep(result, state, 0.0))
