"""The sections about how a run is kept and watched, as the recipe has them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints a killed run resumes from."""

    interval: int | None = None
    """Optimizer steps between checkpoints, besides those at the end of each round."""
    interval_minutes: float | None = 10.0
    """Minutes of training after which one is saved too, at the end of a step; none: never."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides are kept too; none: only the newest."""
    asynchronous: bool = True
    """Write in the background: training waits while the state is copied to host memory, which needs
    room for one rank's share of weights and optimizer."""
    verify: Literal["sizes", "hashes"] = "hashes"
    """What is compared with a checkpoint's manifest before a run resumes from it: the sizes of its
    files, or their bytes too, which reads them once more. One that is damaged is passed over."""
    stop_before: float | None = None
    """Seconds before the time limit of a Slurm job at which the run saves and stops (exit code
    75); none: it waits for a signal (SIGTERM, SIGUSR1, SIGINT), which does the same."""
    stop_part_seconds: float = 60.0
    """How long parts of generation that are begun may still take when a run is asked to stop;
    then, and at a second signal, they are given up, to be sampled again to the same."""


@dataclass(frozen=True)
class LoggingConfig:
    """Trackers and examples. ``metrics.jsonl`` has every step whatever is set here; the console
    shows the newest step on a terminal, and in a log file a step every ten seconds at most."""

    interval: int = 1
    """Optimizer steps between two lines to TensorBoard and wandb; rounds are logged always."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb: bool = False
    """Log to Weights & Biases."""
    wandb_project: str | None = None
    """Project name; none: the tracker's default."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """none: whatever the WANDB_MODE environment variable says."""
    samples: int = 4
    """Example prompts whose responses are logged each round."""


@dataclass(frozen=True)
class ProfileConfig:
    """Steps that torch's profiler records, for ``chrome://tracing`` or Perfetto."""

    steps: tuple[int, ...] = ()
    """Optimizer steps, counted from 1 as in ``metrics.jsonl``; each makes a file in ``profile/`` of
    the run folder. A recorded step is slower."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that record."""
    memory: bool = False
    """Record every allocation as well."""
    stacks: bool = False
    """Record where in the source each operation was asked for."""
