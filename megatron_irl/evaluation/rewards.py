"""The reward on held-out pairs: explicit from a head, or implicit against the reference."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_irl.algorithms.rules import RewardKind
from megatron_irl.objectives.irft import implicit_rewards
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.scoring import Sequences, rounded


def raw_scores(policy: Policy, kind: RewardKind, sequences: Sequences) -> list[float]:
    """Explicit rewards; else summed log-probabilities, still without their reference.

    Collectives: every rank must call.
    """
    if kind == "explicit":
        return policy.score_rewards(sequences)
    return rounded(policy.score_sums(sequences).logp)


def reward_numbers(
    kind: RewardKind, scores: Sequence[float], references: Sequence[Any],
    lengths: Sequence[Sequence[int]], *, beta: float, length_normalize: bool,
) -> dict[str, float]:
    """Accuracy, margin and means of [better_0, worse_0, better_1, ...]; ties count half.

    ``references`` (in nats; not used for explicit rewards) and ``lengths`` in tokens have a row of
    two per pair.
    """
    rewards = np.array(scores, dtype=np.float64).reshape(-1, 2)
    if kind != "explicit":
        rewards = implicit_rewards(
            rewards, np.array(references, dtype=np.float64), np.array(lengths), beta=beta,
            length_normalize=length_normalize,
        )
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "reward_accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()),
        "reward_margin": float(margins.mean()),
        "reward_demo": float(rewards[:, 0].mean()),
        "reward_sample": float(rewards[:, 1].mean()),
    }
