"""The training loop, and what a run records about itself."""
