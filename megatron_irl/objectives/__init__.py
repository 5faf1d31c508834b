"""Objectives: pure functions from log-probabilities or rewards to an unnormalised loss."""

from megatron_irl.objectives.irft import MARGIN_LOSSES, irft_loss
from megatron_irl.objectives.masking import sequence_logprobs
from megatron_irl.objectives.policy_gradient import leave_one_out, policy_gradient_loss
from megatron_irl.objectives.reward import REWARD_LOSSES, reward_loss
from megatron_irl.objectives.sft import sft_loss

__all__ = [
    "MARGIN_LOSSES", "REWARD_LOSSES", "irft_loss", "leave_one_out", "policy_gradient_loss",
    "reward_loss", "sequence_logprobs", "sft_loss",
]
