"""The stretches of optimizer steps a round consists of, and what each of them trains on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_irl.algorithms.objective import (
    likelihood_objective,
    pair_objective,
    policy_objective,
    reward_objective,
)
from megatron_irl.algorithms.rewards import describe_rewards, make_rollouts, scored_pairs
from megatron_irl.config import AlgorithmConfig
from megatron_irl.data.pair_bank import usable_pairs
from megatron_irl.run.rounds import previous_pairs
from megatron_irl.run.session import Session
from megatron_irl.train.batches import Item
from megatron_irl.train.optimizer import Frozen
from megatron_irl.train.step import Objective
from megatron_irl.types import Heads, Pair


@dataclass(frozen=True)
class Work:
    """What the steps of a phase share.

    Attributes:
        items: Drawn from, a global batch a step. Without any the phase is skipped.
        num_unusable: What was left out of ``items`` because it cannot teach.
        outlasts_round: The next round goes on with ``items`` where this one ends, as passes over
            the data need; otherwise they are this round's own.
        second: A second stream: as many again of these in every step. It outlasts the round.
        summary: What the round's line says about the items.
    """

    items: Sequence[Item]
    objective: Objective
    heads: Heads = "logprobs"
    frozen: Frozen = None
    num_unusable: int = 0
    outlasts_round: bool = False
    second: Sequence[Item] = ()
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """Steps ``first`` to ``last`` (not included) of a round.

    ``prepare`` is called with the weights of step ``first``, and again when a run resumes within.
    Collective over every rank.
    """

    name: str
    first: int
    last: int
    prepare: Callable[[Session], Work]


def phases(algorithm: AlgorithmConfig) -> list[Phase]:
    """The phases of a round, in order; ``algorithm`` must be resolved."""
    steps = algorithm.steps_per_round or 0
    if algorithm.name == "rft":
        return [
            Phase("reward", 0, algorithm.reward_steps, learn_reward),
            Phase("policy", algorithm.reward_steps, steps, optimize_policy),
        ]
    prepare = learn_from_pairs if algorithm.is_pairwise else imitate
    return [Phase(algorithm.name, 0, steps, prepare)]


def imitate(session: Session) -> Work:
    """sft: the demonstrations' likelihood."""
    return Work(session.demonstrations, likelihood_objective, outlasts_round=True)


def learn_from_pairs(session: Session) -> Work:
    """irft, spin: demonstration against sample under the implicit reward."""
    state = session.state
    drawn = session.bank.read_round(state.round)
    if session.recipe.algorithm.mix_previous and state.round > 0:
        drawn += previous_pairs(session, state.round)
    pairs, _ = usable_pairs(drawn)
    return Work(
        pairs, pair_objective(session.recipe, state.round),
        num_unusable=len(drawn) - len(pairs), summary={"lengths": mean_lengths(pairs)},
    )


def learn_reward(session: Session) -> Work:
    """rft: demonstration against sample under the explicit reward, and preferences if given."""
    recipe, round_index = session.recipe, session.state.round
    oldest = max(0, round_index - recipe.reward.mix_rounds)
    drawn = [p for r in range(oldest, round_index + 1) for p in session.bank.read_round(r)]
    pairs, _ = usable_pairs(drawn)
    objective, heads = reward_objective(recipe)
    only_head = recipe.reward.trunk == "detached" and not recipe.algorithm.nll_coefficient
    return Work(
        pairs, objective, heads, "trunk" if only_head else None, second=session.preferences,
        num_unusable=len(drawn) - len(pairs), summary={"lengths": mean_lengths(pairs)},
    )


def optimize_policy(session: Session) -> Work:
    """rft: the round's samples with their advantages; scored first, once."""
    recipe, round_index = session.recipe, session.state.round
    pairs = scored_pairs(session)
    rollouts = make_rollouts(pairs, recipe.policy, recipe.algorithm.beta[round_index])
    return Work(
        rollouts, policy_objective(recipe), frozen="reward_head",
        summary={"rewards": describe_rewards(pairs)},
    )


def few_items(work: Work, num_draws: int) -> str | None:
    """Return a warning if most of what was sampled cannot teach, else None.

    Args:
        num_draws: Items that the steps of the phase will draw.
    """
    if not work.items:
        return (
            f"nothing to learn from ({work.num_unusable} samples are empty or equal their "
            "demonstration); the steps are skipped. The policy may already answer as the "
            "demonstrations do: set fewer algorithm.rounds."
        )
    if work.num_unusable <= len(work.items):
        return None
    return (
        f"{work.num_unusable} of {work.num_unusable + len(work.items)} samples are empty or equal "
        f"their demonstration; the {len(work.items)} others are drawn "
        f"{num_draws / len(work.items):.1f} times each. Set fewer steps a round or more "
        "algorithm.prompts_per_round."
    )


def mean_lengths(pairs: Sequence[Pair]) -> dict[str, float]:
    """Mean tokens of demonstrations and samples."""
    count = max(1, len(pairs))
    return {
        "demo_mean": sum(len(pair.demo_ids) for pair in pairs) / count,
        "sample_mean": sum(len(pair.sample_ids) for pair in pairs) / count,
    }
