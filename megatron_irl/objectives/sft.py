"""Supervised fine-tuning: negative log-likelihood of the demonstrations.

Shape suffixes: R response rows, S sequences (all of them demonstrations).
"""

import torch
from torch import Tensor

from megatron_irl.objectives.masking import at_least_float32
from megatron_irl.types import LossOutput, Metric


def sft_loss(
    logprobs_R: Tensor, policy_logps_S: Tensor, *, by_probability: bool = False,
    mean_R: Tensor | None = None, smoothing: float = 0.0,
) -> LossOutput:
    """Negative log-likelihood of demonstration tokens; divided by its weight, nats per token.

    total = - sum over response tokens of w(token) * log pi(token)        weight = R

    With smoothed targets  - sum of (1 - smoothing) * log pi(token) + smoothing * mean(log pi).

    Args:
        logprobs_R: [R] nats, log-probability of each response token.
        policy_logps_S: [S] nats, the same summed by sequence; read for the metrics only.
        by_probability: w = pi(token), through which no gradient flows, instead of 1: dynamic
            fine-tuning (arXiv 2508.05629, eq. 9), which lets unlikely tokens count little.
        mean_R: [R] nats, mean log-probability of all tokens of the vocabulary; None: not smoothed.
        smoothing: Share of a target that is spread over the vocabulary; the metrics stay those of
            the demonstration's own tokens.

    Returns:
        The sum, not the mean: the mean over a global batch weighs every token alike however the
        batch is cut into microbatches. Metrics: ``logp/demo`` (mean summed log-probability of a
        sequence), ``logp/demo_per_token``, ``length/demo`` (tokens).

    Gradient: through logprobs_R, -w for every row; smoothed, through mean_R too.
    Collectives: none.

    Raises:
        ValueError: The inputs are not vectors.
    """
    if logprobs_R.dim() != 1 or policy_logps_S.dim() != 1:
        raise ValueError(f"logprobs_R has shape {tuple(logprobs_R.shape)} and policy_logps_S "
                         f"{tuple(policy_logps_S.shape)}; they must be [R] and [S].")
    logprobs_R = at_least_float32(logprobs_R)
    likelihood = logprobs_R.detach().sum()
    if mean_R is not None:
        total = -((1 - smoothing) * logprobs_R + smoothing * at_least_float32(mean_R)).sum()
    else:
        total = -(logprobs_R.detach().exp() * logprobs_R if by_probability else logprobs_R).sum()
    weight = torch.full((), logprobs_R.numel(), dtype=torch.int32, device=logprobs_R.device)
    num_sequences = policy_logps_S.numel()
    return LossOutput(total=total, weight=weight, metrics={
        "logp/demo": Metric(at_least_float32(policy_logps_S.detach()).sum(), num_sequences),
        "logp/demo_per_token": Metric(likelihood, weight),
        "length/demo": Metric(weight.to(total.dtype), num_sequences),
    })
