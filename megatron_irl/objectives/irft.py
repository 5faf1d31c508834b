"""IRFT and SPIN: the implicit-reward loss on (demonstration, own sample) pairs.

Source: Li et al., "Getting More Juice Out of the SFT Data: Reward Learning from Human
Demonstration Improves SFT for LLM Alignment", arXiv 2405.17888, Algorithm 2.

Shape suffixes: S sequences in the order demo_0, sample_0, demo_1, sample_1, ...; P = S / 2 pairs.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_irl.objectives.masking import at_least_float32
from megatron_irl.types import LossOutput, Metric

# h in h(beta * g), decreasing in the margin. logsigmoid and never log(sigmoid): at a margin of
# -100 the second is log(0).
MARGIN_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda margin: -F.logsigmoid(margin),
    "hinge": lambda margin: torch.clamp(1 - margin, min=0),
    "linear": lambda margin: -margin,
}


def implicit_rewards[Array: (Tensor, np.ndarray)](
    policy_logps: Array, ref_logps: Array, lengths: Array, *, beta: float,
    length_normalize: bool = False,
) -> Array:
    """The implicit reward beta * log(pi / pi_ref); with ``length_normalize``, per token.

    The one definition: training, evaluation and ``score`` call it.

    Args:
        policy_logps: Any shape, nats, summed response log-probabilities under the policy.
        ref_logps: The same under the reference.
        lengths: The responses' tokens, EOS included.
        beta: Scale of the reward.
        length_normalize: Divide each log-ratio by its length.
    """
    log_ratios = policy_logps - ref_logps
    if length_normalize:
        # Empty responses are dropped before they get here; the clip keeps 0/0 out all the same.
        log_ratios = log_ratios / lengths.clip(min=1)
    return beta * log_ratios


def irft_loss(
    policy_logps_S: Tensor,
    ref_logps_S: Tensor,
    lengths_S: Tensor,
    *,
    beta: float,
    loss: str = "sigmoid",
    nll_coefficient: float = 0.0,
    length_normalize: bool = False,
) -> LossOutput:
    """Loss of the implicit reward r = beta * log(pi / pi_ref) (arXiv 2405.17888, Algorithm 2).

    D(u)  = log pi(u|x) - log pi_ref(u|x)           summed over the response's tokens
    g     = D(demo) - D(sample)
    total = sum over pairs of  h(beta * g) + nll_coefficient * (-log pi(demo|x) / len(demo))

    with h: sigmoid -log sigmoid(.), hinge max(0, 1 - .), linear -(.). Minimising raises the
    demonstration and lowers the sample. At pi = pi_ref every g is 0 and sigmoid gives ln 2.

    The linear h on frozen samples never vanishes, is unbounded below and ignores pi_ref: keep the
    steps per round few. The anchor (nll_coefficient) is a mean per token, so that its size does
    not depend on the answer's length; it is counted in pairs like the rest.

    Args:
        policy_logps_S: [S] nats, summed response log-probabilities under the policy.
        ref_logps_S: [S] nats, the same under the reference; a constant.
        lengths_S: [S] int, response tokens.
        beta: Scale of the reward, above 0.
        loss: ``sigmoid``, ``hinge`` or ``linear``.
        nll_coefficient: Weight of the demonstration anchor.
        length_normalize: Divide each D by its length, against a preference for long contrasts.
            Not in the paper; ``beta`` and every reward are then per token.

    Returns:
        The sum over pairs; weight counts pairs. Metrics as in ``_pair_metrics``, and with an
        anchor its two parts, ``loss/margin`` and ``loss/nll``.

    Gradient: through policy_logps_S only.
    Collectives: none.

    Example:
        ::

            logps = torch.tensor([-10.0, -20.0])      # of a demonstration and a sample
            out = irft_loss(logps, logps, torch.tensor([5, 5]), beta=0.1)
            out.total, out.weight                     # 0.6931 (ln 2: pi is pi_ref), 1 pair

    Raises:
        ValueError: Shapes differ, S is odd or 0, or the loss is unknown.
    """
    _check_inputs(policy_logps_S, ref_logps_S, lengths_S, loss)
    policy_logps_S = at_least_float32(policy_logps_S)
    lengths_S = lengths_S.to(policy_logps_S.dtype)
    rewards_S = implicit_rewards(
        policy_logps_S, ref_logps_S.detach(), lengths_S, beta=beta,
        length_normalize=length_normalize,
    )
    margins_P = rewards_S[0::2] - rewards_S[1::2]
    total = margin_total = MARGIN_LOSSES[loss](margins_P).sum()

    num_pairs = margins_P.numel()
    metrics = _pair_metrics(rewards_S.detach(), policy_logps_S.detach(), lengths_S)
    if nll_coefficient:
        nll_total = -(policy_logps_S[0::2] / lengths_S[0::2].clamp(min=1)).sum()
        total = margin_total + nll_coefficient * nll_total
        metrics["loss/margin"] = Metric(margin_total.detach(), num_pairs)
        metrics["loss/nll"] = Metric(nll_total.detach(), num_pairs)
    weight = torch.full((), num_pairs, dtype=torch.int32, device=total.device)
    return LossOutput(total=total, weight=weight, metrics=metrics)


def _pair_metrics(rewards_S: Tensor, logps_S: Tensor, lengths_S: Tensor) -> dict[str, Metric]:
    """Describe the pairs.

    ``reward/demo``, ``reward/sample``: mean beta * D, logged apart because the margin can grow
    while both fall. ``reward/margin``: their difference. ``reward/accuracy``: share of pairs with
    a positive margin, a tie counting half, so that a policy equal to its reference scores 0.5.
    ``reward/abs_margin_max``: how far the policy has gone from its reference at most.
    ``logp/demo``, ``logp/sample``: mean summed log-probability of a response in nats;
    ``logp/demo_per_token``: over tokens. ``length/demo``, ``length/sample``: mean tokens.
    """
    margins_P = rewards_S[0::2] - rewards_S[1::2]
    num_pairs = margins_P.numel()
    wins_P = ((margins_P > 0).to(margins_P.dtype) + (margins_P >= 0).to(margins_P.dtype)) / 2
    return {
        "reward/demo": Metric(rewards_S[0::2].sum(), num_pairs),
        "reward/sample": Metric(rewards_S[1::2].sum(), num_pairs),
        "reward/margin": Metric(margins_P.sum(), num_pairs),
        "reward/accuracy": Metric(wins_P.sum(), num_pairs),
        "reward/abs_margin_max": Metric(margins_P.abs().max(), 1, "max"),
        "logp/demo": Metric(logps_S[0::2].sum(), num_pairs),
        "logp/sample": Metric(logps_S[1::2].sum(), num_pairs),
        "logp/demo_per_token": Metric(logps_S[0::2].sum(), lengths_S[0::2].sum()),
        "length/demo": Metric(lengths_S[0::2].sum(), num_pairs),
        "length/sample": Metric(lengths_S[1::2].sum(), num_pairs),
    }


def _check_inputs(policy_S: Tensor, ref_S: Tensor, lengths_S: Tensor, loss: str) -> None:
    if not (policy_S.shape == ref_S.shape == lengths_S.shape) or policy_S.dim() != 1:
        raise ValueError(f"policy_logps_S has shape {tuple(policy_S.shape)}, ref_logps_S "
                         f"{tuple(ref_S.shape)} and lengths_S {tuple(lengths_S.shape)}; all must "
                         "be [S].")
    if policy_S.numel() % 2 or not policy_S.numel():
        raise ValueError(f"{policy_S.numel()} sequences are not pairs; expected demo, sample, "
                         "demo, sample, ...")
    if loss not in MARGIN_LOSSES:
        raise ValueError(f"loss={loss} is not one of {', '.join(MARGIN_LOSSES)}.")
