"""One decode step's decisions on the device: sample, stop, and move on to the next position.

The state lives in tensors of fixed address and size, so that a step can be captured in a CUDA
graph once per batch size and replayed with no work on the host.

Shape letters: B rows of the step, R rows there is room for, K steps of a burst, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_irl import hardware
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.generation.sampling import sample_rows
from megatron_irl.hardware.replay import Recorder


class DeviceSteps:
    """Rows of a burst: which live on, what they may still sample, and what they have sampled.

    Args:
        context: The dynamic context, whose device-side view of a step is advanced in place.
        rows, steps: R and K.
        capture: Replay a step's kernels as a CUDA graph, one per batch size and sampling.
    """

    def __init__(
        self, context: Any, *, rows: int, steps: int, vocab_size: int, device: torch.device,
        capture: bool,
    ) -> None:
        self._context, self._vocab_size, self._capture = context, vocab_size, capture
        self.device = device

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def on_host(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=hardware.IS_CUDA)

        self._host_uniforms = on_host(steps, rows, dtype=torch.float64)
        self._host_left = on_host(rows, dtype=torch.long)
        self._step = zeros(1, dtype=torch.long)
        self._uniforms = zeros(steps, rows, dtype=torch.float64)
        self._live = zeros(rows, dtype=torch.bool)
        self._left = zeros(rows, dtype=torch.long)
        self._tokens = zeros(steps, rows, dtype=torch.long)
        self._logprobs = zeros(steps, rows, dtype=torch.float32)
        self._was_live = zeros(steps, rows, dtype=torch.bool)
        self._sampling = SamplingConfig()
        # Captured steps read the stop ids of their sampling where they were.
        self._stops: dict[SamplingConfig, Tensor] = {}
        self._recorder = Recorder()
        self._graphs: dict[Any, Any] = {}  # (rows, sampling) to a replay, or None once warmed up

    def choose(self, sampling: SamplingConfig) -> None:
        """How the next bursts sample; before a burst is queued, as the host may wait here."""
        # What a step does with logits depends on neither; every round has another seed.
        self._sampling = replace(sampling, seed=0, max_new_tokens=1)
        if self._sampling not in self._stops:
            stops = sorted(sampling.stop_set)
            self._stops[self._sampling] = torch.tensor(stops, device=self.device)

    def begin(self, uniforms: np.ndarray, left: np.ndarray) -> None:
        """Start a burst of live rows; once its first forward pass is queued.

        Args:
            uniforms: float64 [steps, rows], the random numbers of each.
            left: int64 [rows], what their budgets still allow, 1 or more.
        """
        count, rows = uniforms.shape
        # The device is at work on the first step, and the host must not wait for it: from memory
        # that is not pinned, or in pieces, it might. The host's copies are free after ``collect``.
        self._host_uniforms[:count, :rows] = torch.from_numpy(uniforms)
        self._host_left[:rows] = torch.from_numpy(left)
        self._uniforms[:count].copy_(self._host_uniforms[:count], non_blocking=True)
        self._left.copy_(self._host_left, non_blocking=True)
        self._live.zero_()  # rows of padding sample, and nothing comes of it
        self._live[:rows] = True
        self._step.zero_()

    def sample(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """(int64 [B], float32 [B]): tokens and log-probabilities of the step's rows."""
        rows = logits_BV.shape[0]
        # The number of the step is on the device too: a graph that had it from the host would draw
        # with the numbers of its capture in every replay.
        uniform_B = self._uniforms[:, :rows].index_select(0, self._step)[0]
        return sample_rows(logits_BV[:, : self._vocab_size], uniform_B, self._sampling)

    def advance(self, token_B: Tensor, logprob_B: Tensor) -> None:
        """Keep the step's tokens, end rows, and make the context's view that of the next step.

        A row that has ended stays where it is: until the burst is over it computes its last
        position again and again, in a block of the cache that no other row reads.
        """
        rows = token_B.shape[0]
        live_B, left_B = self._live[:rows], self._left[:rows]
        for buffer, value in (
            (self._tokens, token_B), (self._logprobs, logprob_B), (self._was_live, live_B)
        ):
            buffer[:, :rows].index_copy_(0, self._step, value[None])
        stopped_B = (token_B[:, None] == self._stops[self._sampling]).any(dim=1)
        left_B -= live_B.long()
        live_B &= (left_B > 0) & ~stopped_B
        # In place throughout: the captured layers read these tensors where they are. Nothing here
        # branches on a value, which would be a wait for the device, and not capturable.
        view, length = self._context.gpu_view, self._context.block_size_tokens
        position_B = view.token_to_pos_ids[:rows]
        position_B += live_B.long()
        view.token_to_position_in_request[:rows] += live_B.int()
        view.mha_kv_seq_lengths[:rows] += live_B.int()
        table = view.mha_block_table[:rows]
        # Rows of padding, and rows that ended at full length, may point past the table; what is
        # looked up for them is thrown away below.
        column_B = (position_B // length).clamp(max=table.shape[1] - 1)
        block_B = table.gather(1, column_B[:, None])[:, 0].long()
        for place, value in (
            (view.token_to_input_ids, token_B),
            (view.token_to_block_idx, block_B),
            (view.token_to_local_position_within_kv_block, (position_B % length).int()),
        ):
            place[:rows].copy_(torch.where(live_B, value, place[:rows]))
        self._step += 1

    def step(self, logits_BV: Tensor) -> None:
        """``sample`` and ``advance``; ``logits_BV`` must keep its address where it is captured."""
        if not self._capture:
            self.advance(*self.sample(logits_BV))
            return
        key = (logits_BV.shape[0], logits_BV.data_ptr(), self._sampling)
        if key not in self._graphs:
            self._graphs[key] = None  # the first step runs as it is, and warms the kernels up
            self.advance(*self.sample(logits_BV))
            return
        if self._graphs[key] is None:
            self._graphs[key] = self._recorder.record(
                lambda: self.advance(*self.sample(logits_BV))
            )
        self._graphs[key]()

    def collect(self, steps: int, rows: int) -> tuple[np.ndarray, ...]:
        """Bring a burst to the host: tokens, log-probabilities, was live, all [steps, rows]; and
        which rows live on, [rows].

        This is where the host waits for the device: once a burst.
        """
        found = (self._tokens, self._logprobs, self._was_live)
        parts = [part[:steps, :rows].cpu().numpy() for part in found]
        return *parts, self._live[:rows].cpu().numpy()
