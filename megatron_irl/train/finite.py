"""Updates only by finite gradients: Megatron's optimizers outside fp16 do not look."""

import math
from collections.abc import Sequence
from typing import Any

from megatron_irl.errors import TrainingDiverged


class NotFinite(TrainingDiverged):
    """A loss or gradient norm that is NaN or infinite; weights and optimizer are as before.

    Attributes:
        loss, grad_norm: Of the step, as all ranks see them; NaN where it did not come so far.
        local_losses: Of this rank's microbatches; empty but on the last pipeline stage.
        streams, tokens: What the step drew from and how many tokens; the trainer adds them.
    """

    def __init__(
        self, text: str, *, loss: float, grad_norm: float = math.nan,
        local_losses: list[float] | None = None,
    ) -> None:
        super().__init__(text)
        self.loss, self.grad_norm = loss, grad_norm
        self.local_losses = local_losses or []
        self.streams: Sequence[Any] = ()
        self.tokens = 0


class _BadGradient(Exception):
    """Leaves Megatron's ``step`` between the norm and the update."""


class FiniteUpdates:
    """An optimizer whose ``step`` leaves everything as it is if the gradient norm is not finite.

    The norm that Megatron computes for clipping is read on its way, at no cost. It is of all
    parameters, so every rank finds the same.

    Args:
        optimizer: Megatron's; its instance is changed.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._norm = optimizer, 0.0
        # megatron-core 0.19 computes the norm in one of two ways: chained optimizers, which its
        # factory makes, by the first. Goes when upstream can be told to skip such an update.
        for name in ("get_grad_norm", "clip_grad_norm"):
            if hasattr(optimizer, name):
                setattr(optimizer, name, self._noting(getattr(optimizer, name)))
        self._update = optimizer.step_with_ready_grads
        optimizer.step_with_ready_grads = self._update_if_finite

    def step(self) -> tuple[bool, float]:
        """Update; whether it did, and the gradient norm before clipping. Collective."""
        self._norm = 0.0
        try:
            done, norm, _ = self._optimizer.step()
        except _BadGradient:
            return False, self._norm
        return bool(done), math.nan if norm is None else float(norm)

    def _noting(self, compute: Any) -> Any:
        def compute_and_note(*args: Any, **options: Any) -> Any:
            norm = compute(*args, **options)
            self._norm = float(norm)  # no further wait: Megatron has read it off the device
            return norm

        return compute_and_note

    def _update_if_finite(self) -> bool:
        if not math.isfinite(self._norm):
            # On every rank or none, as the norm is the same: what follows an update over data
            # parallelism (parameters go back to all replicas) is left out by all of them.
            raise _BadGradient
        return self._update()
