"""Token sampling by inverse transform: one uniform number per token, keyed by its position.

A request's randomness is a Philox stream keyed by (seed, key), and token t uses its t-th number.
So the token drawn depends on the logits and on (seed, key, t), never on which requests happened
to share the batch. It is also cheap: no vocabulary-sized noise, no vocabulary-sized cumulative
sum (the vocabulary is searched in two levels), and the log-probability falls out of the same pass.

Shape letters: B rows of logits, V vocabulary, C vocabulary chunks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_irl.generation.interface import SamplingConfig

from megatron.core.inference.sampling import Sampling  # isort: skip  (after hardware)

CHUNK = 256


def sample_rows(
    logits_BV: Tensor, uniform_B: Tensor, sampling: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits_BV: Any float dtype; float32 input is overwritten.
        uniform_B: float64 in [0, 1).
        sampling: Temperature and filters.

    Returns:
        (int64 [B] token ids, float32 [B] their log-probabilities in nats under the softmax of the
        logits as they came, before temperature and filters).
    """
    logits = logits_BV.float()
    peak_B1 = logits.amax(dim=-1, keepdim=True)
    if sampling.greedy:
        token_B = logits.argmax(dim=-1)
        normaliser = logits.sub_(peak_B1).exp_().sum(dim=-1)
        return token_B, -normaliser.log()  # the winner's shifted logit is 0
    if sampling.temperature == 1.0 and sampling.top_k == 0 and sampling.top_p == 1.0:
        weights = logits.sub_(peak_B1).exp_()
        token_B, total_B = _invert(weights, uniform_B)
        chosen = weights.gather(1, token_B[:, None])[:, 0]
        return token_B, chosen.log() - total_B.float().log()
    shifted = logits.sub_(peak_B1)
    weights = (shifted / max(sampling.temperature, 1e-6)).exp_()
    token_B, _ = _invert(filter_weights(weights, sampling.top_k, sampling.top_p), uniform_B)
    chosen = shifted.gather(1, token_B[:, None])[:, 0]
    return token_B, chosen - shifted.exp_().sum(dim=-1).log()


def filter_weights(weights_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero, in place, what is outside the top-k and then outside the nucleus.

    The nucleus is the smallest set of most likely tokens whose mass reaches ``top_p``; tokens tied
    with the last one kept are kept.
    """
    vocab = weights_BV.shape[1]
    if 0 < top_k < vocab:
        floor = weights_BV.topk(top_k, dim=-1).values[:, -1:]
        weights_BV.masked_fill_(weights_BV < floor, 0.0)
    if top_p < 1.0:
        goal_B1 = top_p * weights_BV.sum(dim=-1, keepdim=True, dtype=torch.float64)
        width = min(vocab, top_k or CHUNK)
        while True:  # sorting a whole vocabulary is slow, and the nucleus is nearly always small
            top = weights_BV.topk(width, dim=-1).values
            mass = top.double().cumsum(dim=-1)
            if width == vocab or bool((mass[:, -1:] >= goal_B1).all()):
                break
            width = min(vocab, 8 * width)
        last = (mass < goal_B1).sum(dim=-1, keepdim=True).clamp_(max=width - 1)
        weights_BV.masked_fill_(weights_BV < top.gather(1, last), 0.0)
    return weights_BV


def _invert(weights_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Index where the cumulative weight first exceeds ``uniform * total``; and the total (f64)."""
    rows, vocab = weights_BV.shape
    whole = vocab // CHUNK * CHUNK
    sums = weights_BV[:, :whole].unflatten(1, (-1, CHUNK)).sum(dim=-1)
    if whole < vocab:
        sums = torch.cat([sums, weights_BV[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    upper_BC = sums.double().cumsum(dim=-1)
    total_B = upper_BC[:, -1]
    goal_B1 = (uniform_B * total_B)[:, None]
    chunk_B1 = _first_above(upper_BC, goal_B1, sums > 0)
    rest_B1 = goal_B1 - (upper_BC - sums).gather(1, chunk_B1)
    index = chunk_B1 * CHUNK + torch.arange(CHUNK, device=weights_BV.device)
    inside = weights_BV.gather(1, index.clamp(max=vocab - 1)) * (index < vocab)
    offset_B1 = _first_above(inside.double().cumsum(dim=-1), rest_B1, inside > 0)
    return (chunk_B1 * CHUNK + offset_B1)[:, 0], total_B


def _first_above(cumulative: Tensor, goal: Tensor, positive: Tensor) -> Tensor:
    """First index whose cumulative sum exceeds the goal, kept by rounding to positive weights."""
    found = torch.searchsorted(cumulative, goal, right=True)
    places = torch.arange(positive.shape[1], device=positive.device)
    last = (positive * places).amax(dim=-1, keepdim=True)
    return torch.minimum(found, last)


def uniforms(seed: int, key: int, count: int) -> np.ndarray:
    """float64 [count], the random numbers of one response."""
    return np.random.Generator(np.random.Philox(key=[seed, key])).random(count)


class KeyedSampler(Sampling):
    """The engine's sampling backend and the recorder of what was sampled.

    Recording here, by (request, position), keeps tokens and log-probabilities right even when the
    engine evicts a request and recomputes it, and spares the engine's own per-token lists.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.sampling = SamplingConfig()
        self.begin(self.sampling, [], [], [])

    def begin(
        self, sampling: SamplingConfig, prompt_lengths: Sequence[int], budgets: Sequence[int],
        keys: Sequence[int],
    ) -> None:
        """Start a batch of requests, whose engine ids are 0, 1, 2 … in this order."""
        count, longest = len(budgets), max(budgets, default=0)
        self.sampling = sampling
        self._prompt_lengths = torch.tensor(prompt_lengths, dtype=torch.long)
        self._uniforms = np.zeros((count, longest))
        if not sampling.greedy:
            for row, (key, budget) in enumerate(zip(keys, budgets, strict=True)):
                self._uniforms[row, :budget] = uniforms(sampling.seed, key, budget)
        self.tokens = np.zeros((count, longest), dtype=np.int32)
        self.logprobs = np.zeros((count, longest), dtype=np.float32)
        self.lengths = np.zeros(count, dtype=np.int64)
        self.stops = np.array(sorted(sampling.stop_set))
        self.stopped = np.zeros(0, dtype=bool)

    def sample_kernel(
        self, logits: Tensor, n: int, context: Any, *, no_top_k: bool, no_top_p: bool,
        gather_indices: Tensor | None = None, token_to_request_index: Tensor | None = None,
        output: Tensor | None = None, eager: bool = False, cache_key: Any = None,
    ) -> Tensor:
        """Sample for the step's ``n`` active requests; see the base class."""
        del no_top_k, no_top_p, token_to_request_index, eager, cache_key
        logits = logits[:n] if gather_indices is None else logits[gather_indices[:n]]
        active = slice(context.paused_request_count, context.total_request_count)
        ids = context.request_ids[active].long()
        positions = (
            context.request_kv_length_offsets[active]
            + context.request_query_lengths[active]
            - self._prompt_lengths[ids]
        ).numpy()
        ids = ids.numpy()
        uniform_B = torch.from_numpy(self._uniforms[ids, positions]).to(self.device)
        token_B, logprob_B = sample_rows(logits[:, : self.vocab_size], uniform_B, self.sampling)
        tokens = token_B.cpu().numpy()
        self.tokens[ids, positions] = tokens
        self.logprobs[ids, positions] = logprob_B.cpu().numpy()
        self.lengths[ids] = positions + 1
        self.stopped = np.isin(tokens, self.stops)
        return token_B if output is None else output.copy_(token_B)

    def log_probs_kernel(
        self, logits: Tensor, context: Any, *, token_to_request_index: Tensor | None = None
    ) -> Tensor:
        raise NotImplementedError("log-probabilities are recorded as tokens are sampled")
