"""From scored samples to rollouts: advantages over a prompt's other samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_irl.algorithms.rft import PolicyConfig
from megatron_irl.objectives import leave_one_out
from megatron_irl.types import Pair, Rollout

MIN_SPREAD = 1e-6  # rewards that differ less are equal up to rounding


def make_rollouts(pairs: Sequence[Pair], options: PolicyConfig, beta: float) -> list[Rollout]:
    """Samples with the leave-one-out advantage of r / spread - beta * (log pi - log pi_ref).

    Args:
        pairs: Of one round, ``options.samples_per_prompt`` in a row for each prompt, scored and
            with references.
        beta: Weight of the KL penalty, taken where the sample was drawn.
    """
    rewards = np.array([pair.reward_sample for pair in pairs], dtype=np.float64)
    is_truncated = np.array([pair.finish_reason == "length" for pair in pairs])
    if options.truncated == "cap" and not is_truncated.all():
        worst = rewards[~is_truncated].min()
        rewards = np.where(is_truncated, np.minimum(rewards, worst), rewards)
    spread = rewards.std()
    if options.normalize == "round" and spread > MIN_SPREAD:
        rewards = rewards / spread
    penalised = rewards - beta * log_ratios(pairs)
    advantages = leave_one_out(
        torch.from_numpy(penalised).reshape(-1, options.samples_per_prompt)
    )
    return [
        Rollout(pair.prompt_ids, pair.sample_ids, pair.sample_logprobs, _reference(pair), advantage)
        for pair, advantage in zip(pairs, advantages.flatten().tolist(), strict=True)
    ]


def log_ratios(pairs: Sequence[Pair]) -> np.ndarray:
    """float64 [samples], nats: log pi - log pi_ref of each sample when it was drawn.

    Their mean is an unbiased estimate of KL(pi || pi_ref) where samples are drawn at temperature 1.
    """
    return np.array([
        pair.sample_logprobs.sum(dtype=np.float64) - _reference(pair) for pair in pairs
    ])


def describe_rewards(pairs: Sequence[Pair]) -> dict[str, Any]:
    """What the round's line says of the rewards: means, spreads, the KL, and the entropy."""
    demo = np.array([pair.reward_demo for pair in pairs], dtype=np.float64)
    sample = np.array([pair.reward_sample for pair in pairs], dtype=np.float64)
    logprobs = np.concatenate([pair.sample_logprobs for pair in pairs]).astype(np.float64)
    margins = demo - sample
    return {
        "demo_mean": float(demo.mean()), "demo_std": float(demo.std()),
        "sample_mean": float(sample.mean()), "sample_std": float(sample.std()),
        "accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()),
        "kl_to_reference": float(log_ratios(pairs).mean()),
        "entropy": float(-logprobs.mean()),
    }


def _reference(pair: Pair) -> float:
    assert pair.ref_sample_logp is not None, "the reference pass comes first"
    return pair.ref_sample_logp
