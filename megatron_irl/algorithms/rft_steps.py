"""The steps of rft: what each phase trains on, the round's rewards, and its products."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_irl.algorithms.advantages import describe_rewards, make_rollouts
from megatron_irl.algorithms.base import Work
from megatron_irl.algorithms.pair_steps import mean_lengths
from megatron_irl.algorithms.rft_objectives import policy_objective, reward_objective
from megatron_irl.algorithms.round import Round
from megatron_irl.convert.reward_export import export_hf_reward
from megatron_irl.data.ledger import LedgerRow, write_ledger
from megatron_irl.data.pair_bank import usable_pairs
from megatron_irl.errors import UserError
from megatron_irl.model.reward_head import reward_head
from megatron_irl.parallel.agreement import stop_if_asked
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.scoring import Sequences, score_distinct
from megatron_irl.types import Pair


def learn_reward(round: Round) -> Work:
    """Demonstration against sample under the explicit reward, and preferences if given."""
    recipe = round.recipe
    oldest = max(0, round.index - recipe.reward.mix_rounds)
    drawn: list[Pair] = []
    for earlier in range(oldest, round.index):
        drawn += round.pairs.bank.read_round(earlier)
    drawn += round.pairs.all()
    pairs, _ = usable_pairs(drawn)
    objective, heads = reward_objective(recipe)
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
    pairs = round.pairs.all()
    if any(pair.reward_demo is None or pair.reward_sample is None for pair in pairs):
        raise UserError(
            f"{round.pairs.bank.root} has no rewards for round {round.index}, which its checkpoint "
            "is past. Remove the newest checkpoint, or start a new output_dir."
        )
    recipe = round.recipe
    rollouts = make_rollouts(pairs, recipe.policy, recipe.algorithm.beta[round.index])
    return Work(
        rollouts, policy_objective(recipe), frozen="reward_head",
        summary={"rewards": describe_rewards(pairs)},
    )


def score_round(round: Round) -> None:
    """Store the explicit reward of the round's samples and demonstrations. Collective."""
    topology = round.policy.topology
    with round.clock.timed("scoring"):
        for part in round.pairs.parts:
            pairs = round.pairs.part(part)
            rewards = score_distinct(pairs, lambda sequences: _score(round, sequences))
            for i, pair in enumerate(pairs):
                pair.reward_demo, pair.reward_sample = rewards[2 * i], rewards[2 * i + 1]
            on_main(partial(round.pairs.commit, part), topology)
            stop_if_asked(topology)
        round.pairs.finish()  # a barrier too: no step while a part may still be unwritten
        _write_ledger(round)


def _write_ledger(round: Round) -> None:
    """Commit the reward of the round's demonstrations, and where it is due of all the others.

    The others can be thousands of times as many as the round's, so by default they have to wait for
    the last round. Collective.
    """
    recipe, topology = round.recipe, round.policy.topology
    demonstrations = round.data.demonstrations
    is_last = round.index + 1 == recipe.algorithm.rounds
    known: dict[int, Any] = {}
    samples: dict[int, list[Any]] = {}
    for pair in round.pairs.all():
        known[pair.ordinal] = pair.reward_demo
        samples.setdefault(pair.ordinal, []).append(pair.reward_sample)
    if is_last or recipe.reward.ledger == "every_round":
        rest = [d for d in demonstrations if d.ordinal not in known]
        rewards = _score(round, [(d.prompt_ids, d.response_ids) for d in rest])
        known |= dict(zip([d.ordinal for d in rest], rewards, strict=True))

    def write() -> None:
        rows = [
            LedgerRow.of(d, known[d.ordinal], _mean(samples.get(d.ordinal)))
            for d in demonstrations if d.ordinal in known
        ]
        write_ledger(
            round.ledger, round.index, rows, is_complete=len(rows) == len(demonstrations)
        )

    on_main(write, topology)


def _score(round: Round, sequences: Sequences) -> list[float]:
    with round.console.rewards(len(sequences)) as advance:
        return round.policy.score_rewards(sequences, on_progress=advance)


def _mean(values: list[float] | None) -> float | None:
    return float(np.mean(values)) if values else None


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
