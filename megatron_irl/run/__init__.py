"""A run: its folder, its state, the loop, and what it records about itself."""
