"""What an algorithm says about recipes: its keys, its checks, what follows from what.

Pure and light: this half of an algorithm is read before any process is started. The other half,
what it does with a policy, is ``algorithms.base``.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from megatron_irl.config.schema import Recipe, ReferenceName

RewardKind = Literal["none", "implicit", "explicit"]
"""Where the reward is: nowhere, in the log-ratio to the reference, or in a head of its own."""


class AlgorithmRules:
    """The half of an algorithm that needs nothing but the recipe.

    Attributes:
        name: As in ``algorithm.name``.
        options: Dataclass of its own keys in section ``algorithm``.
        sections: Dataclasses of its own sections, by name.
        unread: Common keys of section ``algorithm`` it does not read, each with the end of the
            sentence that refuses it. They are left out of the written recipe.
        filled: Keys of ``unread`` that ``resolve`` sets nevertheless.
        draws_samples: Whether rounds begin with the policy's own samples.
        reward: What evaluation, the guard and ``score`` take for the reward.
        default_reference: ``algorithm.reference`` where the recipe gives none.
        default_anchor: ``algorithm.nll_coefficient`` likewise.
        preferences: Dotted key of the preference files it trains on, in a section of its own.
    """

    name: ClassVar[str]
    options: ClassVar[type[Any] | None] = None
    sections: ClassVar[Mapping[str, type[Any]]] = {}
    unread: ClassVar[Mapping[str, str]] = {}
    filled: ClassVar[tuple[str, ...]] = ()
    draws_samples: ClassVar[bool] = True
    reward: ClassVar[RewardKind] = "implicit"
    default_reference: ClassVar[ReferenceName] = "round_start"
    default_anchor: ClassVar[float] = 0.0
    preferences: ClassVar[str | None] = None

    def check(self, recipe: Recipe) -> None:
        """Refuse values of its own, and combinations with others, that cannot run. Pure.

        Raises:
            UserError: For the first problem found.
        """

    def round_size(self, recipe: Recipe, num_demonstrations: int) -> tuple[int, int]:
        """Optimizer steps and prompts of a round: what is given decides what is not."""
        algorithm, batch = recipe.algorithm, recipe.train.global_batch_size
        steps, prompts = algorithm.steps_per_round, algorithm.prompts_per_round
        if steps is None:
            prompts = prompts or num_demonstrations
            return -(-prompts // batch), prompts
        return steps, prompts or steps * batch

    def resolve(self, recipe: Recipe, num_demonstrations: int) -> Recipe:
        """Fill what the recipe leaves open. Resolving twice changes nothing.

        Raises:
            UserError: The number of demonstrations conflicts with what is given.
        """
        steps, prompts = self.round_size(recipe, num_demonstrations)
        algorithm = replace(recipe.algorithm, steps_per_round=steps)
        if self.draws_samples:
            beta, anchor = algorithm.beta, algorithm.nll_coefficient
            algorithm = replace(
                algorithm, prompts_per_round=prompts,
                beta=beta * algorithm.rounds if len(beta) == 1 else beta,
                reference=algorithm.reference or self.default_reference,
                nll_coefficient=self.default_anchor if anchor is None else anchor,
            )
        return replace(recipe, algorithm=algorithm)

    def uses_previous_pairs(self, recipe: Recipe) -> bool:
        """Whether a round also trains on the pairs of the one before, kept in a bank beside."""
        del recipe
        return False

    def samples_per_prompt(self, recipe: Recipe) -> int:
        """Responses sampled for each prompt of a round."""
        del recipe
        return 1

    def describe_steps(self, recipe: Recipe) -> str:
        """The steps of a round in words, for ``plan``; ``recipe`` is resolved."""
        steps, batch = recipe.algorithm.steps_per_round, recipe.train.global_batch_size
        return f"{steps} steps of {batch} {'pairs' if self.draws_samples else 'sequences'}"

    def facts(self, recipe: Mapping[str, Any]) -> list[str]:
        """Its settings for the head of a report.

        Args:
            recipe: The mapping of a run's ``recipe.yaml``; keys may be missing.
        """
        algorithm = section(recipe, "algorithm")
        facts = [f"{algorithm.get('loss')} loss", f"β {shown_beta(algorithm.get('beta'))}",
                 f"reference {algorithm.get('reference')}"]
        if algorithm.get("nll_coefficient"):
            facts.append(f"NLL anchor {algorithm['nll_coefficient']}")
        return facts

    def ln2_curve(self, recipe: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether its margin loss is ln 2 where nothing is learnt yet, and the metric that is it.

        The metric is empty where the margin loss is the whole loss.
        """
        algorithm = section(recipe, "algorithm")
        part = "loss/margin" if algorithm.get("nll_coefficient") else ""
        return algorithm.get("loss") == "sigmoid", part


def section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a recipe's mapping; empty where there is none."""
    value = recipe.get(name)
    return value if isinstance(value, Mapping) else {}


def shown_beta(beta: Any) -> Any:
    """One number where all rounds have the same beta, else the list."""
    if isinstance(beta, list | tuple):
        return beta[0] if len(set(beta)) == 1 else ", ".join(map(str, beta))
    return beta
