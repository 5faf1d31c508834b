"""Objectives: pure functions from log-probabilities to an unnormalised loss and its metrics."""

from megatron_irl.objectives.irft import MARGIN_LOSSES, irft_loss
from megatron_irl.objectives.masking import sequence_logprobs
from megatron_irl.objectives.sft import sft_loss

__all__ = ["MARGIN_LOSSES", "irft_loss", "sequence_logprobs", "sft_loss"]
