"""Where a run stands: exactly what a checkpoint must restore besides tensors."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class RunState:
    """Position of the run.

    Attributes:
        step: Optimizer steps done since the run began.
        round: The round in progress, from 0; equal to ``algorithm.rounds`` when all are done.
        step_in_round: Optimizer steps done in that round.
        evaluation: Held-out numbers of the policy at the start of the round.
        summary: What the phases of the round in progress have said for the round's line.
        seconds: Time spent so far, by phase of the round in progress.
        skipped: Steps that took no update because something was not finite.
        lr_scale: What guards have left of the learning rate.
    """

    step: int = 0
    round: int = 0
    step_in_round: int = 0
    evaluation: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    lr_scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunState":
        """From a checkpoint; what earlier versions kept and nobody reads is passed over."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
