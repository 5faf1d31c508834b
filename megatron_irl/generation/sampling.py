"""Token sampling by inverse transform: one uniform number per token, keyed by its position.

A request's randomness is a Philox stream keyed by (seed, key), and token t uses its t-th number.
So the token drawn depends on the logits and on (seed, key, t), never on which requests happened
to share the batch. It is also cheap: no vocabulary-sized noise, no vocabulary-sized cumulative
sum (the vocabulary is searched in two levels), and the log-probability falls out of the same pass.

Nothing here makes the host wait for the device, so a step's sampling can be captured in a CUDA
graph. (On the CPU, where waiting costs nothing, the nucleus is found by a search that looks.)

Shape letters: B rows of logits, V vocabulary, C blocks of the vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from megatron_irl import hardware
from megatron_irl.generation.interface import SamplingConfig

BLOCK = 256


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
    if top_p < 1.0 and hardware.IS_CUDA:
        bisect_nucleus(weights_BV, top_p)
    elif top_p < 1.0:
        goal_B1 = top_p * weights_BV.sum(dim=-1, keepdim=True, dtype=torch.float64)
        width = min(vocab, top_k or BLOCK)
        while True:  # sorting a whole vocabulary is slow, and the nucleus is nearly always small
            top = weights_BV.topk(width, dim=-1).values
            mass = top.double().cumsum(dim=-1)
            if width == vocab or bool((mass[:, -1:] >= goal_B1).all()):
                break
            width = min(vocab, 8 * width)
        last = (mass < goal_B1).sum(dim=-1, keepdim=True).clamp_(max=width - 1)
        weights_BV.masked_fill_(weights_BV < top.gather(1, last), 0.0)
    return weights_BV


def bisect_nucleus(weights_BV: Tensor, top_p: float) -> None:
    """Keep the nucleus, in place, without a sort and without the host.

    The bits of non-negative floats order as the floats do, so 31 halvings find the largest
    threshold whose mass reaches the goal.
    """
    bits_BV = weights_BV.view(torch.int32)
    goal_B1 = top_p * weights_BV.sum(dim=-1, keepdim=True, dtype=torch.float64)
    low_B1 = torch.zeros_like(goal_B1, dtype=torch.int32)
    high_B1 = bits_BV.amax(dim=-1, keepdim=True)
    for _ in range(31):
        middle = low_B1 + (high_B1 - low_B1 + 1) // 2
        inside = weights_BV * (bits_BV >= middle)
        reached = inside.sum(dim=-1, keepdim=True, dtype=torch.float64) >= goal_B1
        low_B1 = torch.where(reached, middle, low_B1)
        high_B1 = torch.where(reached, high_B1, middle - 1)
    weights_BV.masked_fill_(bits_BV < low_B1, 0.0)


def _invert(weights_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Index where the cumulative weight first exceeds ``uniform * total``; and the total (f64)."""
    rows, vocab = weights_BV.shape
    whole = vocab // BLOCK * BLOCK
    # Two levels of about equal length for a vocabulary of 64k. The running sums are float64: the
    # end of a float32 one would be too coarse for a rare token to be drawn as often as it should.
    sums = weights_BV[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1)
    if whole < vocab:
        sums = torch.cat([sums, weights_BV[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    upper_BC = sums.double().cumsum(dim=-1)
    total_B = upper_BC[:, -1]
    goal_B1 = (uniform_B * total_B)[:, None]
    block_B1 = _first_above(upper_BC, goal_B1, sums > 0)
    rest_B1 = goal_B1 - (upper_BC - sums).gather(1, block_B1)
    index = block_B1 * BLOCK + torch.arange(BLOCK, device=weights_BV.device)
    inside = weights_BV.gather(1, index.clamp(max=vocab - 1)) * (index < vocab)
    offset_B1 = _first_above(inside.double().cumsum(dim=-1), rest_B1, inside > 0)
    return (block_B1 * BLOCK + offset_B1)[:, 0], total_B


def _first_above(cumulative: Tensor, goal: Tensor, positive: Tensor) -> Tensor:
    """First index whose cumulative sum exceeds the goal, kept by rounding to positive weights."""
    found = torch.searchsorted(cumulative, goal, right=True)
    places = torch.arange(positive.shape[1], device=positive.device)
    last = (positive * places).amax(dim=-1, keepdim=True)
    return torch.minimum(found, last)


def uniforms(seed: int, key: int, count: int) -> np.ndarray:
    """float64 [count], the random numbers of one response."""
    return np.random.Generator(np.random.Philox(key=[seed, key])).random(count)
