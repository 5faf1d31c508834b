"""The requests of one ``generate`` call: what was asked for and what has been sampled.

A request's random numbers are drawn shortly before it starts and dropped with its last token, so
that a queue of any length costs no more than its prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.generation.sampling import uniforms
from megatron_irl.types import Sample


@dataclass
class _Row:
    uniforms: np.ndarray  # float64 [budget]
    tokens: np.ndarray  # int32 [budget]
    logprobs: np.ndarray  # float32 [budget]
    length: int = 0


class RequestTable:
    """Requests by number, 0, 1, 2 … in the order of the call.

    Args:
        sampling: One setting for all of them.
        budgets: Most tokens of each.
        streams: (seed, key) of each: its Philox stream, whose t-th number draws its t-th token.
    """

    def __init__(
        self, sampling: SamplingConfig, budgets: Sequence[int], streams: Sequence[tuple[int, int]]
    ) -> None:
        self.sampling, self.budgets, self._streams = sampling, budgets, streams
        self._stops = np.array(sorted(sampling.stop_set))
        self._rows: dict[int, _Row] = {}
        self.token_count = 0

    def prepare(self, request: int) -> None:
        """Draw a request's random numbers ahead of its first token."""
        self._row(request)

    def lengths(self, requests: Sequence[int]) -> np.ndarray:
        """int64 [B], tokens sampled so far, which is the position of the next one."""
        return np.array([self._row(r).length for r in requests], dtype=np.int64)

    def left(self, requests: Sequence[int]) -> np.ndarray:
        """int64 [B], tokens that the budgets still allow."""
        return np.array([self.budgets[r] - self._row(r).length for r in requests], dtype=np.int64)

    def uniforms(self, requests: Sequence[int], count: int) -> np.ndarray:
        """float64 [count, B], the next numbers of each; zeros past its budget, and for greedy."""
        out = np.zeros((count, len(requests)))
        if not self.sampling.greedy:
            for column, request in enumerate(requests):
                row = self._row(request)
                part = row.uniforms[row.length : row.length + count]
                out[: len(part), column] = part
        return out

    def record(self, request: int, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Append sampled tokens.

        Recording by request keeps a response whole when the engine evicts the request and computes
        its cache anew.
        """
        row = self._row(request)
        span = slice(row.length, row.length + len(tokens))
        row.tokens[span], row.logprobs[span] = tokens, logprobs
        row.length = span.stop
        self.token_count += len(tokens)

    def is_stop(self, tokens: np.ndarray) -> np.ndarray:
        """Bool [B], whether a token ends its response."""
        return np.isin(tokens, self._stops)

    def finish(self, request: int) -> Sample:
        """The response, whose row is dropped."""
        row = self._rows.pop(request)
        tokens = row.tokens[: row.length].copy()
        reason = "stop" if int(tokens[-1]) in self.sampling.stop_set else "length"
        return Sample(tokens, row.logprobs[: row.length].copy(), reason)

    def _row(self, request: int) -> _Row:
        row = self._rows.get(request)
        if row is None:
            budget = self.budgets[request]
            numbers = (
                np.zeros(0) if self.sampling.greedy else uniforms(*self._streams[request], budget)
            )
            row = self._rows[request] = _Row(
                numbers, np.zeros(budget, np.int32), np.zeros(budget, np.float32)
            )
        return row
