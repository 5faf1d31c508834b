"""Process groups and the collectives that the algorithms need, so that they see tensors only."""
