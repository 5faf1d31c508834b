"""RFT: learning an explicit reward from (demonstration, own sample) pairs, or preference pairs.

Source: Li et al., arXiv 2405.17888, Algorithm 1.

Shape suffixes: S sequences in the order demo_0, sample_0, demo_1, sample_1, ... (or chosen and
rejected); P = S / 2 pairs.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_irl.objectives.masking import at_least_float32
from megatron_irl.types import LossOutput, Metric

RewardLoss = Literal["logistic", "linear"]
REWARD_LOSSES: tuple[RewardLoss, ...] = ("logistic", "linear")


def reward_loss(
    rewards_S: Tensor, *, loss: RewardLoss, bound: float | None, weight: float = 1.0
) -> LossOutput:
    """Raise the reward of demonstrations above that of samples (arXiv 2405.17888, Algorithm 1).

    logistic   total = weight * sum over pairs of  -log sigmoid(r(demo) - r(sample))
    linear     total = weight * sum over pairs of  -(min(r(demo), bound) - max(r(sample), -bound))

    The linear loss is the theory's: it ascends r(demo) - r(sample), and times 1 / beta that is the
    likelihood gradient of the policy pi_ref * exp(r / beta) / Z. On frozen samples it has no
    minimum, hence the bound. It is one-sided: a demonstration is not pushed above +bound nor a
    sample below -bound, and nothing else changes. So

    - while demonstrations are below +bound and samples above -bound, the gradient is exactly the
      theory's (a penalty on large rewards that starts before the bound would bend it, and a clamp
      on both sides would leave a demonstration below -bound without a gradient to bring it back);
    - the loss is never below -2 * bound * weight a pair;
    - the level of r, which differences leave open, is held: with every reward above +bound only
      the samples are pushed, and down; below -bound only the demonstrations, and up.

    Args:
        rewards_S: [S] rewards.
        loss: ``logistic`` or ``linear``.
        bound: Of the linear loss, above 0; None leaves it unbounded. The logistic loss flattens
            out by itself and does not read it.
        weight: Scales the total (not the count): the share of this stream among several.

    Returns:
        The sum over pairs; weight counts pairs. Metrics over pairs: ``reward/demo``,
        ``reward/sample``, ``reward/margin`` (means), ``reward/accuracy`` (share of positive
        margins, a tie counting half), ``reward/spread`` (mean absolute margin; a standard
        deviation would not add up over microbatches) and ``reward/abs_max``.

    Gradient: through rewards_S.
    Collectives: none.

    Raises:
        ValueError: Not a vector of pairs, an unknown loss, a bound that is not positive.
    """
    if rewards_S.dim() != 1 or rewards_S.numel() % 2 or not rewards_S.numel():
        raise ValueError(f"rewards_S has shape {tuple(rewards_S.shape)}; it must be [S] with demo, "
                         "sample, demo, sample, ...")
    if loss not in REWARD_LOSSES:
        raise ValueError(f"loss={loss} is not one of {', '.join(REWARD_LOSSES)}.")
    if bound is not None and not bound > 0:
        raise ValueError(f"bound={bound} must be above 0.")
    rewards_S = at_least_float32(rewards_S)
    demo_P, sample_P = rewards_S[0::2], rewards_S[1::2]
    if loss == "logistic":
        terms_P = -F.logsigmoid(demo_P - sample_P)
    elif bound is None:
        terms_P = sample_P - demo_P
    else:
        terms_P = sample_P.clamp(min=-bound) - demo_P.clamp(max=bound)
    num_pairs = demo_P.numel()
    count = torch.full((), num_pairs, dtype=torch.int32, device=rewards_S.device)
    return LossOutput(total=weight * terms_P.sum(), weight=count,
                      metrics=_pair_metrics(demo_P.detach(), sample_P.detach()))


def _pair_metrics(demo_P: Tensor, sample_P: Tensor) -> dict[str, Metric]:
    margins_P = demo_P - sample_P
    num_pairs = margins_P.numel()
    wins_P = ((margins_P > 0).to(margins_P.dtype) + (margins_P >= 0).to(margins_P.dtype)) / 2
    return {
        "reward/demo": Metric(demo_P.sum(), num_pairs),
        "reward/sample": Metric(sample_P.sum(), num_pairs),
        "reward/margin": Metric(margins_P.sum(), num_pairs),
        "reward/accuracy": Metric(wins_P.sum(), num_pairs),
        "reward/spread": Metric(margins_P.abs().sum(), num_pairs),
        "reward/abs_max": Metric(torch.maximum(demo_P.abs(), sample_P.abs()).max(), 1, "max"),
    }
