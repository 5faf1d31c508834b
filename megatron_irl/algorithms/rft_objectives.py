"""The objectives of rft's two phases, bound to a recipe and to one packed microbatch."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_irl.config import Recipe
from megatron_irl.objectives import policy_gradient_loss, reward_loss, sequence_logprobs
from megatron_irl.train.step import Objective
from megatron_irl.types import HeadChoice, HeadOutputs, LossOutput, Metric, PackedBatch


def reward_objective(recipe: Recipe) -> tuple[Objective, HeadChoice]:
    """Rft's reward steps, and the heads they need: the language model's too if it is anchored."""
    coefficient = recipe.algorithm.nll_coefficient
    options = {"loss": recipe.reward.loss, "bound": recipe.reward.bound}
    weight = recipe.reward.preference_weight
    if coefficient:
        return partial(_anchored, options, weight, coefficient), "both"
    return partial(_reward, options, weight), "rewards"


def policy_objective(recipe: Recipe) -> Objective:
    """Rft's policy steps."""
    return partial(_policy, recipe.policy.clip_low, recipe.policy.clip_high)


def _reward(
    options: dict[str, Any], preference_weight: float, rewards_S: Tensor, batch: PackedBatch
) -> LossOutput:
    """The loss of one stream. Only demonstrations are counted: every step has as many of the other
    stream's pairs, so that dividing by the count gives one mean and the weight times the other.
    """
    if not batch.is_preference:
        return reward_loss(rewards_S, **options)
    out = reward_loss(rewards_S, weight=preference_weight, **options)
    metrics = {
        name.replace("reward/", "preference/"): metric for name, metric in out.metrics.items()
    }
    return LossOutput(out.total, torch.zeros_like(out.weight), metrics)


def _anchored(
    options: dict[str, Any], preference_weight: float, coefficient: float, heads: HeadOutputs,
    batch: PackedBatch,
) -> LossOutput:
    """Add the demonstrations' mean negative log-likelihood per token, counted in pairs."""
    out = _reward(options, preference_weight, heads.rewards_S, batch)
    if batch.is_preference:
        return out
    logps_S = sequence_logprobs(heads.logprobs_R, batch.segment_R, batch.num_sequences)
    demo_logps, num_pairs = logps_S[0::2], batch.num_sequences // 2
    nll = -(demo_logps / batch.lengths_S[0::2]).sum()
    metrics = out.metrics | {
        "loss/reward": Metric(out.total.detach(), num_pairs),
        "loss/nll": Metric(nll.detach(), num_pairs),
        "logp/demo": Metric(demo_logps.detach().sum(), num_pairs),
    }
    return LossOutput(out.total + coefficient * nll, out.weight, metrics)


def _policy(
    clip_low: float, clip_high: float, logprobs_R: Tensor, batch: PackedBatch
) -> LossOutput:
    assert batch.sampled_logprobs_R is not None and batch.advantages_S is not None
    out = policy_gradient_loss(
        logprobs_R, batch.sampled_logprobs_R, batch.advantages_S, batch.segment_R,
        batch.num_sequences, clip_low=clip_low, clip_high=clip_high,
    )
    logps_S = sequence_logprobs(logprobs_R.detach(), batch.segment_R, batch.num_sequences)
    drift = (logps_S - batch.ref_logps_S).sum()
    metrics = out.metrics | {
        # On samples of the round's start, so an estimate of the KL only while the ratio is near 1.
        "policy/log_ratio_to_reference": Metric(drift, batch.num_sequences),
        "length/sample": Metric(batch.lengths_S.sum().float(), batch.num_sequences),
    }
    return LossOutput(out.total, out.weight, metrics)
