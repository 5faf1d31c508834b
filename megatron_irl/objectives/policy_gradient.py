"""RFT: policy optimisation of E[r] - beta * KL(pi || pi_ref) from several samples a prompt.

The KL stands inside the reward: with r' = r - beta * (log pi - log pi_ref) of the whole response,
taken when it was sampled, the gradient of E[r] - beta * KL is E[r' * grad log pi].

Shape suffixes: P prompts, K samples of each; R response rows, S sequences (samples).
"""

import torch
from torch import Tensor

from megatron_irl.objectives.masking import at_least_float32
from megatron_irl.types import LossOutput, Metric

# exp of more overflows float32 soon (at 88); a ratio this far off is no estimate of anything.
MAX_LOG_RATIO = 20.0


def leave_one_out(rewards_PK: Tensor) -> Tensor:
    """Advantage of each sample over the other samples of its prompt.

    A[p, k] = r[p, k] - mean over j != k of r[p, j]

    The baseline does not depend on sample k, so the gradient estimate stays unbiased; dividing by
    a standard deviation, or the mean over all K, would not leave it so.

    Args:
        rewards_PK: [P, K] rewards, the KL penalty included; K of 2 or more.

    Returns:
        [P, K] float32 (float64 if the input is), summing to 0 over each prompt.

    Gradient: none; detached.
    Collectives: none: all samples of a prompt must be here.

    Raises:
        ValueError: Not a matrix, or fewer than two samples a prompt.
    """
    if rewards_PK.dim() != 2 or rewards_PK.shape[1] < 2:
        raise ValueError(f"rewards_PK has shape {tuple(rewards_PK.shape)}; it must be [prompts, "
                         "samples] with at least 2 samples a prompt.")
    rewards_PK = at_least_float32(rewards_PK.detach())
    num_samples = rewards_PK.shape[1]
    # K / (K - 1) * (r - mean) is the same; differences first keep it exact for equal rewards.
    differences_PKK = rewards_PK.unsqueeze(2) - rewards_PK.unsqueeze(1)
    return differences_PKK.sum(2) / (num_samples - 1)


def policy_gradient_loss(
    logprobs_R: Tensor,
    sampled_logprobs_R: Tensor,
    advantages_S: Tensor,
    segment_R: Tensor,
    num_sequences: int,
    *,
    clip_low: float,
    clip_high: float,
) -> LossOutput:
    """Clipped policy gradient on own samples (PPO's surrogate, token by token).

    ratio = pi(token) / pi(token) when sampled,   A = the advantage of the token's sequence
    total = - sum over sequences of sum over tokens of
              min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)

    At ratio 1 the gradient is -A * grad log pi(response): unbiased for samples of the current
    policy. Tokens are summed, not averaged within a response, which would favour short good and
    long bad ones.

    Args:
        logprobs_R: [R] nats, each response token under the policy.
        sampled_logprobs_R: [R] nats, the same when it was sampled; a constant.
        advantages_S: [S]; a constant.
        segment_R: [R] int64, the sequence each row belongs to.
        num_sequences: S.
        clip_low: The ratio earns nothing below 1 - clip_low, in (0, 1].
        clip_high: Nor above 1 + clip_high, above 0.

    Returns:
        The sum; weight counts sequences. Metrics over tokens: ``policy/ratio`` (mean),
        ``policy/clip_fraction`` (share whose gradient the clip removes), ``policy/entropy``
        (nats a token, estimated as ratio * -log pi) and ``policy/kl_to_sampler`` (nats a token,
        KL(pi || sampler) estimated as ratio * log ratio - ratio + 1, which is never negative).

    Gradient: through logprobs_R only.
    Collectives: none.

    Raises:
        ValueError: Shapes differ, or a clip is out of range.
    """
    _check_inputs(logprobs_R, sampled_logprobs_R, advantages_S, segment_R, num_sequences)
    if not (0 < clip_low <= 1 and clip_high > 0):
        raise ValueError(f"clip_low={clip_low} must be in (0, 1] and clip_high={clip_high} "
                         "above 0.")
    logprobs_R = at_least_float32(logprobs_R)
    advantages_R = advantages_S.detach().to(logprobs_R.dtype)[segment_R]
    log_ratio_R = logprobs_R - sampled_logprobs_R.detach()
    ratio_R = log_ratio_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_R = ratio_R.clamp(1 - clip_low, 1 + clip_high)
    total = -torch.minimum(ratio_R * advantages_R, clipped_R * advantages_R).sum()
    weight = torch.full((), num_sequences, dtype=torch.int32, device=total.device)
    ratio_R = ratio_R.detach()
    is_clipped_R = torch.where(advantages_R > 0, ratio_R > 1 + clip_high, ratio_R < 1 - clip_low)
    is_clipped_R &= advantages_R != 0
    kl_R = ratio_R * ratio_R.log() - ratio_R + 1
    num_tokens = logprobs_R.numel()
    return LossOutput(total=total, weight=weight, metrics={
        "policy/ratio": Metric(ratio_R.sum(), num_tokens),
        "policy/clip_fraction": Metric(is_clipped_R.to(ratio_R.dtype).sum(), num_tokens),
        "policy/entropy": Metric(-(ratio_R * logprobs_R.detach()).sum(), num_tokens),
        "policy/kl_to_sampler": Metric(kl_R.sum(), num_tokens),
    })


def _check_inputs(logprobs_R: Tensor, sampled_R: Tensor, advantages_S: Tensor, segment_R: Tensor,
                  num_sequences: int) -> None:
    if not (logprobs_R.shape == sampled_R.shape == segment_R.shape) or logprobs_R.dim() != 1:
        raise ValueError(f"logprobs_R has shape {tuple(logprobs_R.shape)}, sampled_logprobs_R "
                         f"{tuple(sampled_R.shape)} and segment_R {tuple(segment_R.shape)}; all "
                         "must be [R].")
    if advantages_S.shape != (num_sequences,):
        raise ValueError(f"advantages_S has shape {tuple(advantages_S.shape)}; it must be "
                         f"[{num_sequences}].")
