"""Sampling from the policy that trains."""

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.generation.interface import Generator, SamplingConfig

__all__ = ["Generator", "SamplingConfig"]
