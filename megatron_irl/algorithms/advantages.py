"""From scored samples to rollouts: advantages over a prompt's other samples."""

from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np
import torch

from megatron_irl.algorithms.rft import PolicyConfig
from megatron_irl.data.round_pairs import PairRows
from megatron_irl.objectives import leave_one_out
from megatron_irl.types import Rollout

MIN_SPREAD = 1e-6  # rewards that differ less are equal up to rounding


def advantages(index: np.ndarray, options: PolicyConfig, beta: float) -> np.ndarray:
    """The leave-one-out advantage of r / spread - beta * (log pi - log pi_ref): float64 [samples].

    Args:
        index: Rows of ``data.pair_index.INDEX`` of one round, ``options.samples_per_prompt`` in a
            row for each prompt, scored and with references.
        beta: Weight of the KL penalty, taken where the sample was drawn.
    """
    # Every rank computes all of them, of the same numbers in the same order and in float64: equal
    # bits everywhere, and nothing is sent.
    rewards = index["reward_sample"].astype(np.float64)
    is_truncated = ~index["stopped"]
    if options.truncated == "cap" and not is_truncated.all():
        worst = rewards[~is_truncated].min()
        rewards = np.where(is_truncated, np.minimum(rewards, worst), rewards)
    spread = rewards.std()
    if options.normalize == "round" and spread > MIN_SPREAD:
        rewards = rewards / spread
    penalised = rewards - beta * log_ratios(index)
    return leave_one_out(
        torch.from_numpy(penalised).reshape(-1, options.samples_per_prompt)
    ).flatten().numpy()


class RolloutRows(Sequence[Rollout]):
    """Samples of a round with their advantages (``data.stored.Stored``), read as ``PairRows`` are.

    Args:
        pairs: The samples.
        advantages: float64 [samples].
    """

    def __init__(self, pairs: PairRows, advantages: np.ndarray) -> None:
        self._pairs, self._advantages = pairs, advantages

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Rollout: ...
    @overload
    def __getitem__(self, index: slice) -> "RolloutRows": ...
    def __getitem__(self, index: int | slice) -> "Rollout | RolloutRows":
        if isinstance(index, slice):
            return RolloutRows(self._pairs[index], self._advantages[index])
        pair, advantage = self._pairs[index], float(self._advantages[index])
        assert pair.ref_sample_logp is not None, "the reference pass comes first"
        return Rollout(pair.prompt_ids, pair.sample_ids, pair.sample_logprobs,
                       pair.ref_sample_logp, advantage)

    def chosen(self, indices: Sequence[int]) -> "RolloutRows":
        """These of the samples, in this order."""
        return RolloutRows(self._pairs.chosen(indices),
                           self._advantages[np.asarray(indices, np.int64)])

    def token_counts(self, *, share_prompts: bool) -> list[int]:
        """Of each: prompt and sample, which shares it with none."""
        del share_prompts
        known = self._pairs.numbers
        return (known["prompt_length"] + known["sample_length"]).tolist()

    def keep(self, indices: Iterable[int]) -> None:
        """As of ``PairRows``."""
        self._pairs.keep(indices)


def log_ratios(index: np.ndarray) -> np.ndarray:
    """float64 [samples], nats: log pi - log pi_ref of each sample when it was drawn.

    Their mean is an unbiased estimate of KL(pi || pi_ref) where samples are drawn at temperature 1.
    """
    return index["sample_logp"] - index["ref_sample_logp"].astype(np.float64)


def describe_rewards(index: np.ndarray) -> dict[str, Any]:
    """What the round's line says of the rewards: means, spreads, the KL, and the entropy."""
    demo = index["reward_demo"].astype(np.float64)
    sample = index["reward_sample"].astype(np.float64)
    margins = demo - sample
    return {
        "demo_mean": float(demo.mean()), "demo_std": float(demo.std()),
        "sample_mean": float(sample.mean()), "sample_std": float(sample.std()),
        "accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()),
        "kl_to_reference": float(log_ratios(index).mean()),
        "entropy": float(-index["sample_logp"].sum() / index["sample_length"].sum()),
    }
