"""What a run folder calls what it keeps, for all who read it from outside of a run."""

RECIPE = "recipe.yaml"  # resolved, with versions and revision; it makes a folder a run's
IDENTITY = "run.json"  # fingerprint, what the run began with, whether it ended

HF = "hf"  # the weights exported, with tokenizer and template
HF_REWARD = "hf_reward"
CHECKPOINTS = "checkpoints"
LEDGER = "ledger"
EVALUATION = "evaluation"  # what ``evaluate`` found of it
