"""The steps of rft: what each phase trains on, the round's rewards, and its products."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_irl.algorithms.advantages import RolloutRows, advantages, describe_rewards
from megatron_irl.algorithms.base import Work
from megatron_irl.algorithms.pair_steps import mean_lengths, usable
from megatron_irl.algorithms.rft_ledger import write_round_ledger
from megatron_irl.algorithms.rft_objectives import policy_objective, reward_objective
from megatron_irl.algorithms.round import Round
from megatron_irl.convert.reward_export import export_hf_reward
from megatron_irl.errors import UserError
from megatron_irl.model.reward_head import reward_head
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.references import index_pairs, open_pairs, score_parts
from megatron_irl.policy.scoring import distinct_sequences
from megatron_irl.types import Pair


def learn_reward(round: Round) -> Work:
    """Demonstration against sample under the explicit reward, and preferences if given."""
    recipe = round.recipe
    bank, topology = round.pairs.bank, round.policy.topology
    drawn = round.pairs.rows()
    for earlier in reversed(range(max(0, round.index - recipe.reward.mix_rounds), round.index)):
        bank.require(earlier)
        drawn = index_pairs(open_pairs(bank, earlier), topology).rows() + drawn
    pairs = usable(drawn)
    objective, heads = reward_objective(recipe)
    # No gradient enters a detached trunk, but its momentum and decay would still move it.
    only_head = recipe.reward.trunk == "detached" and not recipe.algorithm.nll_coefficient
    return Work(
        pairs, objective, heads, "trunk" if only_head else None, second=round.data.preferences,
        num_unusable=len(drawn) - len(pairs), summary={"lengths": mean_lengths(pairs)},
    )


def optimize_policy(round: Round, *, score_first: bool) -> Work:
    """The round's samples with their advantages.

    Args:
        score_first: The reward has just been learnt: score the round and write its ledger.

    Collectives: every rank must call.

    Raises:
        UserError: The bank of a resumed run lacks rewards that it had.
    """
    if score_first:
        score_round(round)
    index = round.pairs.index
    if np.isnan(index["reward_demo"]).any() or np.isnan(index["reward_sample"]).any():
        raise UserError(
            f"{round.pairs.bank.root} has no rewards for round {round.index}, which its checkpoint "
            "is past. Remove the newest checkpoint, or start a new output_dir."
        )
    recipe = round.recipe
    found = advantages(index, recipe.policy, recipe.algorithm.beta[round.index])
    return Work(
        RolloutRows(round.pairs.rows(), found), policy_objective(recipe), frozen="reward_head",
        summary={"rewards": describe_rewards(index)},
    )


def score_round(round: Round) -> None:
    """Store the explicit reward of the round's samples and demonstrations. Collective."""

    def score(pairs: list[Pair]) -> np.ndarray:
        """float32 [pairs, 2]."""
        sequences, places = distinct_sequences(pairs)
        with round.console.rewards(len(sequences)) as advance:
            scores = round.policy.score_rewards(sequences, alone=True, on_progress=advance)
        rewards = np.array([scores[place] for place in places], np.float32).reshape(-1, 2)
        for pair, (demo, sample) in zip(pairs, rewards.tolist(), strict=True):
            pair.reward_demo, pair.reward_sample = demo, sample
        return rewards

    with round.clock.timed("scoring"):
        # In the order of the parts, which is the index's; so nobody reads them again to index them.
        by_part = score_parts(round.policy, round.pairs, score)
        rewards = np.concatenate([np.zeros((0, 2), np.float32), *by_part])
        round.pairs.index["reward_demo"], round.pairs.index["reward_sample"] = rewards.T
        write_round_ledger(round)


def export_reward(policy: Policy, out_dir: Path, companions: dict[str, Any]) -> None:
    """Backbone and reward head as an HF sequence classifier. Collective over every rank.

    Args:
        companions: ``hf_config`` and the keywords of ``export_hf_reward``.
    """
    head = reward_head(policy.chunks)
    export_hf_reward(
        policy.chunks, head.weight if head is not None else None, policy.architecture,
        out_dir=out_dir, **companions,
    )
