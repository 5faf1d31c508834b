"""What an algorithm is: which steps a round consists of, and what they train on.

An algorithm is one object of a subclass of ``Algorithm``, in a file of its own, named in
``algorithms.registry``. Nothing else knows which algorithms there are.

Imports of torch and Megatron wait inside methods, here and in the files of the algorithms: a
process that only reads a recipe must not pay for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron_irl.algorithms.registry import rules_of
from megatron_irl.algorithms.rules import AlgorithmRules
from megatron_irl.config.schema import Recipe

if TYPE_CHECKING:
    from megatron_irl.algorithms.round import Round
    from megatron_irl.parallel.topology import Topology
    from megatron_irl.policy.policy import Policy
    from megatron_irl.train.batches import Item
    from megatron_irl.train.optimizer import Frozen
    from megatron_irl.train.step import Objective
    from megatron_irl.types import HeadChoice


@dataclass(frozen=True)
class Work:
    """What the steps of a phase share.

    Attributes:
        items: Drawn from, a global batch a step. Without any the phase is skipped.
        objective: What every step minimises.
        heads: What the objective is given.
        frozen: Parameters that the steps leave as they are.
        num_unusable: What was left out of ``items`` because it cannot teach.
        outlasts_round: The next round goes on with ``items`` where this one ends, as passes over
            the data need; otherwise they are this round's own.
        second: A second stream: as many again of these in every step. It outlasts the round.
        summary: What the round's line says about the items.
    """

    items: "Sequence[Item]"
    objective: "Objective"
    heads: "HeadChoice" = "logprobs"
    frozen: "Frozen" = None
    num_unusable: int = 0
    outlasts_round: bool = False
    second: "Sequence[Item]" = ()
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """Steps ``first`` to ``last`` (not included) of a round.

    ``prepare(round, step)`` is called with the weights of step ``first``, and again when a run
    resumes within; ``step`` tells the two apart. Collective over every rank.

    For the planner: how many sequences an item is, and which heads will be asked for.
    """

    name: str
    first: int
    last: int
    prepare: "Callable[[Round, int], Work]"
    sequences_per_item: int = 2
    heads: "HeadChoice" = "logprobs"


class Algorithm(AlgorithmRules):
    """An algorithm: its rules about recipes, and what it does with a policy.

    A subclass says what its rounds consist of; whatever else it leaves alone is as for an algorithm
    that learns from (demonstration, sample) pairs under the implicit reward.

    Example:
        A pass over the demonstrations a round, the whole file of an algorithm::

            class Imitation(Algorithm):
                name = "imitation"
                draws_samples = False
                reward = "none"

                def phases(self, recipe):
                    return [Phase(self.name, 0, recipe.algorithm.steps_per_round, self._work)]

                def _work(self, round, step):
                    from megatron_irl.objectives import sft_loss, sequence_logprobs

                    def objective(logprobs_R, batch):
                        logps_S = sequence_logprobs(
                            logprobs_R, batch.segment_R, batch.num_sequences)
                        return sft_loss(logprobs_R, logps_S)

                    return Work(round.data.demonstrations, objective, outlasts_round=True)

        and the line ``"imitation": "my_package.imitation:Imitation"`` in the registry.
    """

    def phases(self, recipe: Recipe) -> list[Phase]:
        """The phases of a round, in order; together they are ``steps_per_round`` steps.

        Args:
            recipe: Resolved.
        """
        raise NotImplementedError

    def attach_heads(self, recipe: Recipe, chunks: Sequence[Any], topology: "Topology") -> None:
        """Give bare model chunks the heads it needs beside the language model's. No collective."""

    def head_lr(self, recipe: Recipe) -> float | None:
        """Peak learning rate of the reward head's own parameter group; None without a head."""
        del recipe
        return None

    def export(self, policy: "Policy", run_folder: Path, companions: dict[str, Any],
               say: Callable[[str], None]) -> None:
        """Leave what it has learnt besides the policy in the run folder.

        Args:
            companions: What ``convert.export`` wants besides weights and folder.
            say: Shows a line to the user, on the main rank.

        Collectives: every rank calls.
        """


def algorithm_of(recipe: Recipe) -> Algorithm:
    """The algorithm that a recipe names."""
    return cast(Algorithm, rules_of(recipe.algorithm.name))
