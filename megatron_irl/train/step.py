"""One optimizer step, or one evaluation pass, through Megatron's pipeline schedules.

The only place where an objective's ``LossOutput`` becomes Megatron's (loss, count, report).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_irl import hardware
from megatron_irl.data.packing import lengthen
from megatron_irl.errors import TrainingDiverged
from megatron_irl.model.build import unwrap
from megatron_irl.model.forward import HeadProcessor, forward_packed
from megatron_irl.parallel.reduce import reduce_metrics
from megatron_irl.parallel.topology import Topology
from megatron_irl.train.optimizer import Frozen, freeze
from megatron_irl.types import Heads, LossOutput, Metric, PackedBatch

from megatron.core.distributed import finalize_model_grads  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
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
    """Drives Megatron's schedule over packed microbatches on this rank's model chunks.

    Args:
        chunks: DDP-wrapped model chunks for training; bare ones suffice for evaluation.
        optimizer: Megatron's optimizer, or None for evaluation only.
        chunk_size: Response rows whose logits exist at one time.
    """

    def __init__(
        self, chunks: Sequence[Any], topology: Topology, *, optimizer: Any = None,
        chunk_size: int = 2048,
    ) -> None:
        self.chunks = list(chunks)
        self.topology = topology
        self.optimizer = optimizer
        self.processor = HeadProcessor(chunk_size)
        self.config = get_model_config(self.chunks[0])
        self.config.finalize_model_grads_func = partial(
            finalize_model_grads, pg_collection=topology.groups
        )
        virtual = topology.vpp_size if topology.vpp_size > 1 else None
        self.schedule = get_forward_backward_func(topology.pp_size, virtual)

    def train_step(
        self, microbatches: Sequence[PackedBatch], objective: Objective, *,
        heads: Heads = "logprobs", frozen: Frozen = None, where: str = "",
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
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self._run(microbatches, objective, heads, forward_only=False)
        metrics = reduce_metrics(reports, self.topology, hardware.device())
        loss = metrics.pop("loss")
        if not _finite(loss):
            raise TrainingDiverged(f"the loss is {loss} {where}")
        with freeze(self.optimizer, frozen):
            _, grad_norm, _ = self.optimizer.step()
        grad_norm = float(grad_norm)
        if not _finite(grad_norm):
            raise TrainingDiverged(f"the gradient norm is {grad_norm} {where}")
        return StepResult(loss, grad_norm, metrics)

    def token_logprobs(self, microbatches: Sequence[PackedBatch]) -> list[list[Tensor]]:
        """Per microbatch, per sequence: float32 response log-probabilities on the CPU.

        Evaluation mode, no gradient. Empty except on the last pipeline stage.
        Collectives: tensor and pipeline parallel ranks of one replica must call together.
        """
        return [
            list(out.cpu().split(batch.lengths_S.tolist()))
            for out, batch in self._evaluate(microbatches, "logprobs")
        ]

    def rewards(self, microbatches: Sequence[PackedBatch]) -> list[list[Tensor]]:
        """Per microbatch, per sequence: the float32 scalar reward on the CPU.

        Evaluation mode, no gradient; the model must have a reward head. Empty except on the last
        pipeline stage.
        Collectives: tensor and pipeline parallel ranks of one replica must call together.
        """
        return [list(out.cpu()) for out, _ in self._evaluate(microbatches, "rewards")]

    def _evaluate(
        self, microbatches: Sequence[PackedBatch], heads: Heads
    ) -> Iterator[tuple[Tensor, PackedBatch]]:
        padded = self._fill_pipeline(microbatches)
        outputs = self._run(padded, None, heads, forward_only=True)[: len(microbatches)]
        return zip(outputs, microbatches, strict=False)

    def _run(
        self, microbatches: Sequence[PackedBatch], objective: Objective | None, heads: Heads, *,
        forward_only: bool,
    ) -> list[Any]:
        longest = max(batch.tokens_T.shape[1] for batch in microbatches)
        if self.topology.vpp_size > 1:  # the interleaved schedule knows one shape only
            microbatches = [lengthen(batch, longest) for batch in microbatches]
        iterators = [iter(microbatches) for _ in self.chunks]
        for chunk in self.chunks:
            # Said again only where it changes something: it walks through every module.
            if not chunk.training == unwrap(chunk).training == (not forward_only):
                chunk.train(not forward_only)
        with torch.set_grad_enabled(not forward_only):
            return self.schedule(
                forward_step_func=partial(self._forward_step, objective, heads),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(iterators) > 1 else self.chunks[0],
                num_microbatches=len(microbatches),
                seq_length=longest,
                micro_batch_size=1,  # one packed row
                forward_only=forward_only,
                collect_non_loss_data=objective is None,
            )

    def _forward_step(
        self, objective: Objective | None, heads: Heads, iterator: Iterator[PackedBatch],
        chunk: nn.Module,
    ) -> tuple[Any, Callable[..., Any]]:
        batch = next(iterator).to(hardware.device())
        output = forward_packed(chunk, batch, self.processor, heads)
        if objective is None:
            return output, _keep_output
        return output, partial(_megatron_loss, objective, batch)

    def _fill_pipeline(self, microbatches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Repeat the last microbatch until the interleaved schedule accepts the number."""
        group = self.topology.pp_size if self.topology.vpp_size > 1 else 1
        missing = -len(microbatches) % group
        return list(microbatches) + [microbatches[-1]] * missing


def _keep_output(output: Tensor, non_loss_data: bool = True) -> Tensor:
    del non_loss_data
    return output.detach()


def _megatron_loss(
    objective: Objective, batch: PackedBatch, output: Any
) -> tuple[Tensor, Tensor, dict[str, Metric]]:
    out = objective(output, batch)
    report = dict(out.metrics)
    report["loss"] = Metric(out.total.detach(), out.weight)
    return out.total, out.weight.to(torch.int), report


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
