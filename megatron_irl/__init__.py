"""Reward learning from demonstrations on Megatron-Core."""

__version__ = "0.1.0"
