"""Between reward learning and policy optimisation: score the round once, make its advantages."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_irl.config import PolicyConfig
from megatron_irl.data.ledger import LedgerRow, write_ledger
from megatron_irl.errors import UserError
from megatron_irl.objectives import leave_one_out
from megatron_irl.parallel.reduce import from_main
from megatron_irl.policy.scoring import score_rewards
from megatron_irl.run.rounds import score_distinct
from megatron_irl.run.session import Session
from megatron_irl.train.batches import Sequences
from megatron_irl.types import Pair, Rollout

MIN_SPREAD = 1e-6  # rewards that differ less are equal up to rounding


def scored_pairs(session: Session) -> list[Pair]:
    """The round's pairs with their rewards, prompt after prompt.

    They are scored when the round's last reward step is done, stored in the bank, and read back by
    a run that resumes later. Collectives: every rank must call.

    Raises:
        UserError: The bank of a resumed run lacks rewards that it had.
    """
    state, bank = session.state, session.bank
    if state.step_in_round == session.recipe.algorithm.reward_steps:
        score_round(session)
    pairs = bank.read_round(state.round)
    if any(pair.reward_demo is None or pair.reward_sample is None for pair in pairs):
        raise UserError(
            f"{bank.root} has no rewards for round {state.round}, which its checkpoint is past. "
            "Remove the newest checkpoint, or start a new output_dir."
        )
    return pairs


def score_round(session: Session) -> None:
    """Store the explicit reward of the round's samples and demonstrations. Collective."""
    topology, bank, round_index = session.topology, session.bank, session.state.round
    chunks = from_main(bank.complete_chunks(round_index) if topology.is_main else None, topology)
    with session.timed("scoring"):
        for chunk in chunks:
            pairs = bank.read_chunk(round_index, chunk)
            rewards = score_distinct(pairs, lambda sequences: _score(session, sequences))
            for i, pair in enumerate(pairs):
                pair.reward_demo, pair.reward_sample = rewards[2 * i], rewards[2 * i + 1]
            if topology.is_main:
                bank.write_chunk(round_index, chunk, pairs)
        topology.barrier()
        _write_ledger(session)


def _write_ledger(session: Session) -> None:
    """Commit the reward of the round's demonstrations, and where it is due of all the others.

    The others can be thousands of times as many as the round's, so by default they have to wait for
    the last round. Collective.
    """
    round_index, recipe = session.state.round, session.recipe
    is_last = round_index + 1 == recipe.algorithm.rounds
    known: dict[int, Any] = {}
    samples: dict[int, list[Any]] = {}
    for pair in session.bank.read_round(round_index):
        known[pair.ordinal] = pair.reward_demo
        samples.setdefault(pair.ordinal, []).append(pair.reward_sample)
    if is_last or recipe.reward.ledger == "every_round":
        rest = [d for d in session.demonstrations if d.ordinal not in known]
        rewards = _score(session, [(d.prompt_ids, d.response_ids) for d in rest])
        known |= dict(zip([d.ordinal for d in rest], rewards, strict=True))
    if session.topology.is_main:
        rows = [
            LedgerRow.of(d, known[d.ordinal], _mean(samples.get(d.ordinal)))
            for d in session.demonstrations if d.ordinal in known
        ]
        write_ledger(
            session.folder.ledger, round_index, rows,
            is_complete=len(rows) == len(session.demonstrations),
        )
    session.topology.barrier()


def _score(session: Session, sequences: Sequences) -> list[float]:
    with session.progress.rewards(len(sequences)) as advance:
        return score_rewards(
            session.stepper, sequences, multiple_of=session.multiple_of, on_progress=advance
        )


def _mean(values: list[float] | None) -> float | None:
    return float(np.mean(values)) if values else None


def make_rollouts(pairs: Sequence[Pair], options: PolicyConfig, beta: float) -> list[Rollout]:
    """Samples with the leave-one-out advantage of r / spread - beta * (log pi - log pi_ref).

    Args:
        pairs: Of one round, ``options.samples_per_prompt`` in a row for each prompt, scored and
            with references.
        beta: Weight of the KL penalty, taken where the sample was drawn.
    """
    rewards = np.array([pair.reward_sample for pair in pairs], dtype=np.float64)
    is_truncated = np.array([pair.finish_reason == "length" for pair in pairs])
    if options.truncated == "cap" and not is_truncated.all():
        worst = rewards[~is_truncated].min()
        rewards = np.where(is_truncated, np.minimum(rewards, worst), rewards)
    spread = rewards.std()
    if options.normalize == "round" and spread > MIN_SPREAD:
        rewards = rewards / spread
    penalised = rewards - beta * log_ratios(pairs)
    advantages = leave_one_out(
        torch.from_numpy(penalised).reshape(-1, options.samples_per_prompt)
    )
    return [
        Rollout(pair.prompt_ids, pair.sample_ids, pair.sample_logprobs, _reference(pair), advantage)
        for pair, advantage in zip(pairs, advantages.flatten().tolist(), strict=True)
    ]


def log_ratios(pairs: Sequence[Pair]) -> np.ndarray:
    """float64 [samples], nats: log pi - log pi_ref of each sample when it was drawn.

    Their mean is an unbiased estimate of KL(pi || pi_ref) where samples are drawn at temperature 1.
    """
    return np.array([
        pair.sample_logprobs.sum(dtype=np.float64) - _reference(pair) for pair in pairs
    ])


def describe_rewards(pairs: Sequence[Pair]) -> dict[str, Any]:
    """What the round's line says of the rewards: means, spreads, the KL, and the entropy."""
    demo = np.array([pair.reward_demo for pair in pairs], dtype=np.float64)
    sample = np.array([pair.reward_sample for pair in pairs], dtype=np.float64)
    logprobs = np.concatenate([pair.sample_logprobs for pair in pairs]).astype(np.float64)
    margins = demo - sample
    return {
        "demo_mean": float(demo.mean()), "demo_std": float(demo.std()),
        "sample_mean": float(sample.mean()), "sample_std": float(sample.std()),
        "accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()),
        "kl_to_reference": float(log_ratios(pairs).mean()),
        "entropy": float(-logprobs.mean()),
    }


def _reference(pair: Pair) -> float:
    assert pair.ref_sample_logp is not None, "the reference pass comes first"
    return pair.ref_sample_logp
