"""One optimizer step: the only place where an objective's ``LossOutput`` becomes Megatron's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_irl import hardware
from megatron_irl.errors import TrainingDiverged
from megatron_irl.parallel.reduce import reduce_metrics
from megatron_irl.policy.policy import Policy
from megatron_irl.train.optimizer import Frozen, freeze
from megatron_irl.types import HeadChoice, LossOutput, Metric, PackedBatch

from megatron.core.distributed import finalize_model_grads  # isort: skip
from megatron.core.utils import get_model_config  # isort: skip

Objective = Callable[[Any, PackedBatch], LossOutput]
"""(what the heads say, the batch) → loss. Log-probabilities [R], rewards [S] or ``HeadOutputs``,
according to the ``heads`` the step is asked to run."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: global loss, gradient norm before clipping, and metrics."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]


class Stepper:
    """Updates a policy.

    Args:
        policy: Over DDP-wrapped model chunks.
        optimizer: Megatron's optimizer over the same chunks.
    """

    def __init__(self, policy: Policy, optimizer: Any) -> None:
        self.policy, self.optimizer = policy, optimizer
        # Called by the schedule after the last backward: reduces gradients over data parallelism
        # and tied embeddings over the pipeline, and divides by the global count.
        get_model_config(policy.chunks[0]).finalize_model_grads_func = partial(
            finalize_model_grads, pg_collection=policy.topology.groups
        )

    def train_step(
        self, microbatches: Sequence[PackedBatch], objective: Objective, *,
        heads: HeadChoice = "logprobs", frozen: Frozen = None, where: str = "",
    ) -> StepResult:
        """Forward, backward, one update.

        Args:
            microbatches: This data-parallel rank's share of the global batch; the number must be
                the same on every rank.
            heads: What the objective is given.
            frozen: Parameters that this step leaves as they are, whatever their momentum.
            where: Named in the error when the loss is not finite.

        Raises:
            TrainingDiverged: The loss or gradient norm is NaN or infinite. A bad loss is found
                before the update, so the weights are still good.

        Collectives: every rank must call.
        """
        policy = self.policy
        for chunk in policy.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss_of = partial(_megatron_loss, objective)
        reports = policy.schedule.forward_backward(microbatches, heads, loss_of)
        # Reads the device: the one wait of a step before the update. The check below needs it.
        metrics = reduce_metrics(reports, policy.topology, hardware.device())
        loss = metrics.pop("loss")
        if not _finite(loss):
            raise TrainingDiverged(f"the loss is {loss} {where}")
        with freeze(self.optimizer, frozen):
            _, grad_norm, _ = self.optimizer.step()
        grad_norm = float(grad_norm)
        if not _finite(grad_norm):
            raise TrainingDiverged(f"the gradient norm is {grad_norm} {where}")
        return StepResult(loss, grad_norm, metrics)


def _megatron_loss(
    objective: Objective, batch: PackedBatch, output: Any
) -> tuple[Tensor, Tensor, dict[str, Metric]]:
    out = objective(output, batch)
    report = dict(out.metrics)
    report["loss"] = Metric(out.total.detach(), out.weight)
    return out.total, out.weight.to(torch.int), report


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
