"""What a run leaves on disk: files committed by rename, and checkpoints."""
