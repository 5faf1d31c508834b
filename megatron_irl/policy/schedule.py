"""Packed microbatches through Megatron's pipeline schedules, forward only or with backward."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_irl import hardware
from megatron_irl.data.packing import lengthen
from megatron_irl.model.build import unwrap
from megatron_irl.model.forward import HeadProcessor, forward_packed
from megatron_irl.parallel.topology import Topology
from megatron_irl.types import HeadChoice, PackedBatch

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

MegatronLoss = Callable[[PackedBatch, Any], tuple[Tensor, Tensor, dict[str, Any]]]
"""(batch, what the heads say) → (unnormalised loss, its count, what to report), as Megatron's
schedules take them with ``calculate_per_token_loss``."""


class PipelineSchedule:
    """Megatron's schedule over this rank's model chunks; the one caller of it.

    Args:
        chunks: DDP-wrapped model chunks for training; bare ones suffice for evaluation.
        rows_at_once: Response rows whose logits exist at one time.
    """

    def __init__(self, chunks: Sequence[Any], topology: Topology, *, rows_at_once: int) -> None:
        self.chunks, self.topology = list(chunks), topology
        self.processor = HeadProcessor(rows_at_once)
        virtual = topology.vpp_size if topology.vpp_size > 1 else None
        self._schedule = get_forward_backward_func(topology.pp_size, virtual)

    def evaluate(
        self, microbatches: Sequence[PackedBatch], heads: HeadChoice
    ) -> list[tuple[Tensor, PackedBatch]]:
        """What the heads say about each microbatch; evaluation mode, no gradient.

        Returns:
            (output, its microbatch) in order; empty except on the last pipeline stage.

        Collectives: tensor and pipeline parallel ranks of one replica must call together.
        """
        padded = self._fill_pipeline(microbatches)
        outputs = self._run(padded, heads, None)[: len(microbatches)]
        return list(zip(outputs, microbatches, strict=False))

    def forward_backward(
        self, microbatches: Sequence[PackedBatch], heads: HeadChoice, loss: MegatronLoss
    ) -> list[dict[str, Any]]:
        """Accumulate the gradients of the loss, divided by its global count; training mode.

        Returns:
            What ``loss`` reported of each microbatch; empty except on the last pipeline stage.

        Collectives: every rank must call; the schedule ends by reducing gradients.
        """
        return self._run(microbatches, heads, loss)

    def _run(
        self, microbatches: Sequence[PackedBatch], heads: HeadChoice, loss: MegatronLoss | None
    ) -> list[Any]:
        # Of this replica alone, whose ranks hold the same microbatches: data-parallel ranks differ
        # in length and do not meet within the schedule.
        longest = max(batch.tokens_T.shape[1] for batch in microbatches)
        if self.topology.vpp_size > 1:  # the interleaved schedule knows one shape only
            microbatches = [lengthen(batch, longest) for batch in microbatches]
        # Every chunk of this rank sees all microbatches, in an order of the schedule's choice, so
        # each has an iterator of its own.
        iterators = [iter(microbatches) for _ in self.chunks]
        for chunk in self.chunks:
            # Said again only where it changes something: it walks through every module.
            if not chunk.training == unwrap(chunk).training == (loss is not None):
                chunk.train(loss is not None)
        with torch.set_grad_enabled(loss is not None):
            return self._schedule(
                forward_step_func=partial(self._forward_step, loss, heads),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(iterators) > 1 else self.chunks[0],
                num_microbatches=len(microbatches),
                seq_length=longest,
                micro_batch_size=1,  # one packed row
                forward_only=loss is None,
                collect_non_loss_data=loss is None,  # the outputs, and no loss of them
            )

    def _forward_step(
        self, loss: MegatronLoss | None, heads: HeadChoice, iterator: Iterator[PackedBatch],
        chunk: nn.Module,
    ) -> tuple[Any, Callable[..., Any]]:
        """One microbatch through one chunk, as the schedule asks: (output, output → loss)."""
        # Each stage makes its own copy: the batch is equal on all ranks of a replica, and what goes
        # down the pipeline are hidden states only.
        batch = next(iterator).to(hardware.device())
        output = forward_packed(chunk, batch, self.processor, heads)
        return output, _keep_output if loss is None else partial(loss, batch)

    def _fill_pipeline(self, microbatches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Repeat the last microbatch until the interleaved schedule accepts the number."""
        group = self.topology.pp_size if self.topology.vpp_size > 1 else 1
        missing = -len(microbatches) % group  # dropped again by ``evaluate``
        return list(microbatches) + [microbatches[-1]] * missing


def _keep_output(output: Tensor, non_loss_data: bool = True) -> Tensor:
    del non_loss_data
    return output.detach()
