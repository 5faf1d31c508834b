"""The policy: a model on its ranks that scores and generates; no optimizer here."""
