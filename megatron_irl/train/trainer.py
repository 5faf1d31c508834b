"""Optimizer steps of a run: what draws a batch, updates the policy and moves the schedule on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_irl.config import Recipe
from megatron_irl.data.sampler import order_seed
from megatron_irl.policy.policy import Policy
from megatron_irl.train.batches import Item, draw, microbatches_for, num_tokens
from megatron_irl.train.optimizer import Frozen, build_schedule, current_lr, reset_optimizer
from megatron_irl.train.step import Objective, Stepper, StepResult
from megatron_irl.types import HeadChoice, PackedBatch


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

    Args:
        recipe: Resolved; its ``train``, ``schedule`` and ``algorithm`` sections are read.
        policy: Over DDP-wrapped chunks.
        optimizer: Megatron's, over the same chunks.
    """

    def __init__(self, recipe: Recipe, policy: Policy, optimizer: Any) -> None:
        self.recipe, self.policy, self.optimizer = recipe, policy, optimizer
        self.stepper = Stepper(policy, optimizer)
        self.scheduler = build_schedule(recipe, optimizer)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return current_lr(self.optimizer)

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
            What the step did, and the tokens it processed over all ranks.

        Raises and collectives: as ``Stepper.train_step``.
        """
        batch, microbatches = self.draw_batch(streams)
        result = self.stepper.train_step(
            microbatches, objective, heads=heads, frozen=frozen, where=where
        )
        self.scheduler.step(1)
        return result, sum(map(num_tokens, batch))

    def draw_batch(self, streams: Sequence[Stream]) -> tuple[list[Item], list[PackedBatch]]:
        """The next global batch, and this rank's microbatches of it; equal draws on every rank."""
        options = self.recipe.train
        batch: list[Item] = []
        microbatches: list[PackedBatch] = []
        for stream in streams:
            drawn = draw(stream.items, stream.seed, stream.step, options.global_batch_size)
            batch += drawn
            microbatches += microbatches_for(
                drawn, self.policy.topology, micro_batch_size=options.micro_batch_size,
                micro_batch_tokens=options.micro_batch_tokens,
                multiple_of=self.policy.multiple_of,
            )
        return batch, microbatches


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
    for items, outlasts_round in streams:
        if not items:
            continue
        position, begun_in = step - first, round
        if outlasts_round:
            position, begun_in = position + round * (last - first), 0
        found.append(Stream(items, order_seed(seed, begun_in, min(first, 1)), position))
    return found
