"""Optimizer steps: batches, schedule, update."""
