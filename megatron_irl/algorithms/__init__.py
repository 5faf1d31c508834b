"""The algorithms: what each one learns from, phase by phase."""
