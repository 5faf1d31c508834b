"""The requests of one ``generate`` call: what was asked for and what has been sampled.

A request's random numbers are drawn shortly before it starts and dropped with its last token, so
that a queue of any length costs no more than its prompts. The requests under way share a few
tables, so that a burst reads and writes all of them at once while the device waits.
"""

from collections.abc import Sequence

import numpy as np

from megatron_irl.generation.interface import Ends, SamplingConfig
from megatron_irl.generation.sampling import uniforms
from megatron_irl.types import Sample


class RequestTable:
    """Requests by number, 0, 1, 2 … in the order of the call.

    Args:
        sampling: One setting for all of them.
        budgets: Most tokens of each.
        streams: (seed, key) of each: its Philox stream, whose t-th number draws its t-th token.
        ends: As in ``Generator.generate``.

    Shape letters: B requests, K tokens of each.
    """

    def __init__(
        self, sampling: SamplingConfig, budgets: Sequence[int], streams: Sequence[tuple[int, int]],
        ends: Ends | None = None,
    ) -> None:
        self.sampling, self.budgets, self._streams = sampling, budgets, streams
        self._ends, self._ended = ends, set[int]()
        self._stops = np.array(sorted(sampling.stop_set))
        self._row_of: dict[int, int] = {}  # of the requests under way
        self._free: list[int] = []
        longest = max(budgets, default=0)
        self._uniforms = np.zeros((0, 0 if sampling.greedy else longest))
        self._tokens = np.zeros((0, longest), np.int32)
        self._logprobs = np.zeros((0, longest), np.float32)
        self._lengths = np.zeros(0, np.int64)
        self._budgets = np.zeros(0, np.int64)
        self.token_count = 0

    def prepare(self, request: int) -> None:
        """Draw a request's random numbers ahead of its first token."""
        self._row(request)

    def lengths(self, requests: Sequence[int]) -> np.ndarray:
        """int64 [B], tokens sampled so far, which is the position of the next one."""
        rows_B = self._rows(requests)  # may enlarge what is read next
        return self._lengths[rows_B]

    def left(self, requests: Sequence[int]) -> np.ndarray:
        """int64 [B], tokens that the budgets still allow."""
        rows_B = self._rows(requests)
        return self._budgets[rows_B] - self._lengths[rows_B]

    def uniforms(self, requests: Sequence[int], count: int) -> np.ndarray:
        """float64 [K = count, B], the next numbers of each; zeros past the end, and for greedy."""
        rows_B = self._rows(requests)
        out_KB = np.zeros((count, len(rows_B)))
        position_KB = self._lengths[rows_B] + np.arange(count)[:, None]
        inside_KB = position_KB < self._uniforms.shape[1]
        row_KB = np.broadcast_to(rows_B, position_KB.shape)
        out_KB[inside_KB] = self._uniforms[row_KB[inside_KB], position_KB[inside_KB]]
        return out_KB

    def record(
        self, requests: Sequence[int], tokens_KB: np.ndarray, logprobs_KB: np.ndarray,
        counts_B: np.ndarray,
    ) -> None:
        """Append to each request the first of what was sampled for it.

        Recording by request keeps a response whole when the engine evicts the request and computes
        its cache anew.

        Args:
            counts_B: How many of the K tokens are the request's.
        """
        rows_B, step_K1 = self._rows(requests), np.arange(len(tokens_KB))[:, None]
        mine_KB = step_K1 < counts_B
        row_KB = np.broadcast_to(rows_B, mine_KB.shape)
        place = row_KB[mine_KB], (self._lengths[rows_B] + step_K1)[mine_KB]
        self._tokens[place], self._logprobs[place] = tokens_KB[mine_KB], logprobs_KB[mine_KB]
        self._lengths[rows_B] += counts_B
        self.token_count += int(counts_B.sum())

    def is_stop(self, tokens: np.ndarray) -> np.ndarray:
        """Bool [B], whether a token ends its response."""
        return np.isin(tokens, self._stops)

    def has_ended(self, requests: Sequence[int]) -> np.ndarray:
        """Bool [B], whether the caller wants no more of a response than was recorded."""
        if self._ends is not None:
            for request, row in zip(requests, self._rows(requests), strict=True):
                if self._ends(request, self._tokens[row, : self._lengths[row]]):
                    self._ended.add(request)
        return np.array([request in self._ended for request in requests], dtype=bool)

    def finish(self, request: int) -> Sample:
        """The response, whose row is free for another request from now on."""
        row = self._row_of.pop(request)
        self._free.append(row)
        length = int(self._lengths[row])
        tokens = self._tokens[row, :length].copy()
        is_stop = request in self._ended or int(tokens[-1]) in self.sampling.stop_set
        reason = "stop" if is_stop else "length"
        return Sample(tokens, self._logprobs[row, :length].copy(), reason)

    def _rows(self, requests: Sequence[int]) -> np.ndarray:
        return np.array([self._row(request) for request in requests], dtype=np.int64)

    def _row(self, request: int) -> int:
        row = self._row_of.get(request)
        if row is None:
            if not self._free:
                self._enlarge()
            row = self._row_of[request] = self._free.pop()
            budget = self.budgets[request]
            self._lengths[row], self._budgets[row] = 0, budget
            if not self.sampling.greedy:
                self._uniforms[row] = 0.0
                self._uniforms[row, :budget] = uniforms(*self._streams[request], budget)
        return row

    def _enlarge(self) -> None:
        old = len(self._lengths)
        new = max(16, 2 * old)
        self._free += reversed(range(old, new))
        # New tables: rows handed out by number stay valid, views of the old tables would not.
        for name in ("_uniforms", "_tokens", "_logprobs", "_lengths", "_budgets"):
            table = getattr(self, name)
            larger = np.zeros((new, *table.shape[1:]), table.dtype)
            larger[:old] = table
            setattr(self, name, larger)
