"""From an HF architecture to Megatron-Core modules: specs, build, heads and precision."""
