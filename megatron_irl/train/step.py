"""Optimizer steps: a batch is drawn, the policy updated, the schedule moved on.

The only place where an objective's ``LossOutput`` becomes Megatron's (loss, count, report).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_irl import hardware
from megatron_irl.collector import no_collection
from megatron_irl.config import Recipe
from megatron_irl.data.sampler import order_seed
from megatron_irl.data.stored import Stored
from megatron_irl.flops import Tokens
from megatron_irl.parallel.reduce import reduce_metrics
from megatron_irl.policy.policy import Policy
from megatron_irl.train.batches import (
    Item,
    chosen,
    draw,
    microbatches_for,
    share_of,
    token_counts,
    work_of,
)
from megatron_irl.train.finite import FiniteUpdates, NotFinite
from megatron_irl.train.optimizer import (
    Frozen,
    build_schedule,
    current_lr,
    freeze,
    lowered,
    reset_optimizer,
)
from megatron_irl.types import HeadChoice, LossOutput, Metric, PackedBatch

from megatron.core.distributed import finalize_model_grads  # isort: skip
from megatron.core.utils import get_model_config  # isort: skip

Objective = Callable[[Any, PackedBatch], LossOutput]
"""(what the heads say, the batch) → loss. Log-probabilities [R], or [R, 2] with means, rewards [S]
or ``HeadOutputs``, according to the ``heads`` the step is asked to run."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: global loss, gradient norm before clipping, and metrics."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]


class Stepper:
    """Updates a policy.

    Example:
        ::

            stepper = Stepper(policy, optimizer)
            mine = microbatches_for(items, topology, multiple_of=policy.multiple_of)
            result = stepper.train_step(mine, objective)    # result.loss, result.grad_norm

    Args:
        policy: Over DDP-wrapped model chunks.
        optimizer: Megatron's optimizer over the same chunks.

    Attributes:
        lr_scale: Of every learning rate that the schedule gives; 1 unless a guard lowered it.
    """

    def __init__(self, policy: Policy, optimizer: Any) -> None:
        self.lr_scale = 1.0
        self.policy, self.optimizer = policy, optimizer
        self._updates = FiniteUpdates(optimizer)
        # Called by the schedule after the last backward: reduces gradients over data parallelism
        # and tied embeddings over the pipeline, and divides by the global count. (All chunks of a
        # rank share one config, and the schedule asks the first one's.)
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
            NotFinite: The loss or gradient norm is NaN or infinite, found on every rank before the
                update: weights and optimizer are as they were.

        Collectives: every rank must call.
        """
        with no_collection():
            return self._train_step(microbatches, objective, heads, frozen, where)

    def _train_step(
        self, microbatches: Sequence[PackedBatch], objective: Objective, heads: HeadChoice,
        frozen: Frozen, where: str,
    ) -> StepResult:
        policy = self.policy
        # Every time anew: a step that took no update has left its NaN gradients where they were.
        for chunk in policy.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss_of = partial(_megatron_loss, objective)
        reports = policy.schedule.forward_backward(microbatches, heads, loss_of)
        # Reads the device: the one wait of a step before the update. The check below needs it.
        metrics = reduce_metrics(reports, policy.topology, hardware.device())
        loss = metrics.pop("loss")
        # The same number on every rank, so all of them leave here or none does.
        if not math.isfinite(loss):
            raise NotFinite(f"the loss is {loss} {where}", loss=loss, local_losses=_means(reports))
        with freeze(self.optimizer, frozen), lowered(self.optimizer, self.lr_scale):
            _, grad_norm = self._updates.step()
        policy.note_update()
        if not math.isfinite(grad_norm):
            raise NotFinite(f"the gradient norm is {grad_norm} {where}", loss=loss,
                            grad_norm=grad_norm, local_losses=_means(reports))
        return StepResult(loss, grad_norm, metrics)


@dataclass(frozen=True)
class Stream:
    """Items that every step takes a global batch of.

    Attributes:
        seed: Of their order.
        step: How many batches were taken before.
    """

    items: Sequence[Item]
    seed: int
    step: int


class Trainer:
    """Owns the optimizer and its schedule.

    Example:
        ::

            optimizer = build_optimizer(options, policy.chunks, topology)
            trainer = Trainer(recipe, policy, optimizer)
            stream = Stream(demonstrations, order_seed(recipe.seed, 0, 0), step=0)
            result, tokens = trainer.step([stream], likelihood_objective, heads="logprobs",
                                          frozen=None, where="at step 1")

    Args:
        recipe: Resolved; its ``train``, ``schedule`` and ``algorithm`` sections are read.
        policy: Over DDP-wrapped chunks.
        optimizer: Megatron's, over the same chunks.

    Attributes:
        work: Of this rank's replica in the newest step.
    """

    def __init__(self, recipe: Recipe, policy: Policy, optimizer: Any) -> None:
        self.recipe, self.policy, self.optimizer = recipe, policy, optimizer
        self.stepper = Stepper(policy, optimizer)
        self.work = Tokens.of(())
        self.scheduler = build_schedule(recipe, optimizer)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return current_lr(self.optimizer) * self.stepper.lr_scale

    def restart(self) -> None:
        """Forget the moments and begin the schedule anew; the weights stay."""
        reset_optimizer(self.optimizer)
        self.scheduler = build_schedule(self.recipe, self.optimizer)

    def step(
        self, streams: Sequence[Stream], objective: Objective, *, heads: HeadChoice,
        frozen: Frozen, where: str,
    ) -> tuple[StepResult, int]:
        """One update on a global batch of every stream.

        Returns:
            What the step did, and the tokens of the sequences it trained on, over all ranks: a
            prompt counts in each, computed once or not, as in other trainers' figures.

        Raises and collectives: as ``Stepper.train_step``.
        """
        microbatches, tokens = self.draw_batch(streams)
        try:
            result = self.stepper.train_step(
                microbatches, objective, heads=heads, frozen=frozen, where=where
            )
        except NotFinite as bad:
            bad.streams, bad.tokens = streams, tokens
            raise
        self.scheduler.step(1)
        return result, tokens

    def skip(self, bad: NotFinite) -> tuple[StepResult, int]:
        """Go on after a step that took no update: the schedule moves, its batch was drawn."""
        self.scheduler.step(1)
        return StepResult(bad.loss, bad.grad_norm, {"skipped": 1.0}), bad.tokens

    def draw_batch(self, streams: Sequence[Stream]) -> tuple[list[PackedBatch], int]:
        """This rank's microbatches of the next global batch, and the tokens of all of it."""
        options = self.recipe.train
        microbatches: list[PackedBatch] = []
        tokens = 0
        for stream in streams:
            # Every rank draws the whole batch, by numbers alone, and makes its own share of it.
            drawn = self.drawn(stream)
            tokens += sum(token_counts(drawn, share_prompts=False))
            microbatches += microbatches_for(
                drawn, self.policy.topology, micro_batch_size=options.micro_batch_size,
                micro_batch_tokens=options.micro_batch_tokens,
                multiple_of=self.policy.multiple_of, share_prompts=options.share_prompts,
            )
        self.work = work_of(microbatches)
        return microbatches, tokens

    def read_ahead(self, steps: Iterable[Sequence[Stream]]) -> None:
        """Read what this rank will train on in coming steps of the same items, and nothing else.

        Collectives: none.

        Raises:
            UserError: Something of it cannot be read.
        """
        options, topology = self.recipe.train, self.policy.topology
        size = options.global_batch_size
        wanted: dict[int, tuple[Stored, set[int]]] = {}
        for streams in steps:
            for stream in streams:
                if not isinstance(stream.items, Stored):
                    continue
                _, indices = wanted.setdefault(id(stream.items), (stream.items, set()))
                drawn = draw(len(stream.items), stream.seed, stream.step, size)
                lengths = token_counts(
                    chosen(stream.items, drawn), share_prompts=options.share_prompts)
                share = share_of(
                    lengths, topology, options.micro_batch_size, options.micro_batch_tokens)
                indices.update(drawn[i] for microbatch in share for i in microbatch)
        for items, indices in wanted.values():
            items.keep(sorted(indices))

    def drawn(self, stream: Stream) -> Sequence[Item]:
        """The items of a stream's next global batch; equal on every rank."""
        size = self.recipe.train.global_batch_size
        return chosen(stream.items, draw(len(stream.items), stream.seed, stream.step, size))


def streams_of(
    streams: Sequence[tuple[Sequence[Item], bool]], *, seed: int, round: int, step: int,
    first: int, last: int,
) -> list[Stream]:
    """Where a step of a round stands in each stream of its phase; streams without items go.

    Args:
        streams: (items, whether the next round goes on with them where this one ends).
        seed: Of the run.
        step: Steps of the round done before this one.
        first, last: Of the phase, in steps of the round.
    """
    found = []
    # Known without a state of its own: where a stream stands follows from where the step does, so
    # a resumed run, and a step that was skipped, draw what the others would.
    for items, outlasts_round in streams:
        if not items:
            continue
        position, begun_in = step - first, round
        if outlasts_round:
            position, begun_in = position + round * (last - first), 0
        found.append(Stream(items, order_seed(seed, begun_in, min(first, 1)), position))
    return found


def _megatron_loss(
    objective: Objective, batch: PackedBatch, output: Any
) -> tuple[Tensor, Tensor, dict[str, Metric]]:
    out = objective(output, batch)
    report = dict(out.metrics)
    report["loss"] = Metric(out.total.detach(), out.weight)
    # Nothing here is read: the schedule adds losses and counts (in int32) up on the device.
    return out.total, out.weight.to(torch.int), report


def _means(reports: Sequence[dict[str, Metric]]) -> list[float]:
    """The loss of each microbatch of this rank; a sync each, where it no longer matters."""
    return [float(r["loss"].total) / max(float(r["loss"].weight), 1.0) for r in reports]
