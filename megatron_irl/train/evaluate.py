"""Held-out evaluation: likelihood, implicit reward, exact match, length and EOS rate."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_irl.data.pair_bank import usable_pairs
from megatron_irl.train.rounds import add_references, generate, pair_sequences, sample_pairs
from megatron_irl.train.scoring import score_sequences, summed
from megatron_irl.train.session import Session
from megatron_irl.types import Demonstration, Pair

GREEDY_SEED = 0  # greedy generation draws nothing


def evaluate(session: Session, next_round: int) -> dict[str, Any]:
    """Evaluate the weights as they are: ``numbers``, and ``examples`` of responses.

    Fresh samples of the held-out prompts go to the held-out bank as those of ``next_round``: the
    next round's reward is judged on them, since its reference is this very policy.

    Collectives: every rank must call.
    """
    demonstrations, options = session.heldout, session.recipe.evaluation
    if not demonstrations:
        return {}
    with session.timed("evaluation"):
        scores = score_sequences(
            session.stepper, [(d.prompt_ids, d.response_ids) for d in demonstrations],
            multiple_of=session.multiple_of,
        )
        num_tokens = sum(map(len, scores))
        numbers: dict[str, Any] = {
            "nll": -float(sum(s.sum(dtype=np.float64) for s in scores)) / num_tokens,
            "nll_tokens": num_tokens,
            "num_demonstrations": len(demonstrations),
        }
        subset = demonstrations[: options.limit]
        ids: list[np.ndarray] = []
        if options.samples:
            sample_pairs(session, session.heldout_bank, next_round, subset)
            pairs = session.heldout_bank.read_round(next_round)
            ids = [pair.sample_ids for pair in pairs]
            numbers |= _sample_numbers(session, subset, pairs)
        if options.greedy and any(d.answer is not None for d in subset):
            with session.timed("generation"):
                samples = generate(
                    session, [d.prompt_ids for d in subset], seed=GREEDY_SEED, temperature=0.0
                )
                session.generator.close()
            ids = [sample.token_ids for sample in samples]
            numbers |= _exact_match(session, subset, ids, "greedy_exact_match")
        shown = session.recipe.logging.samples
        examples = [_example(session, d, i) for d, i in zip(subset[:shown], ids, strict=False)]
    return {"numbers": numbers, "examples": examples}


def evaluate_reward(session: Session, round_index: int) -> dict[str, Any]:
    """Implicit reward of held-out demonstrations against the samples drawn before the round.

    A demonstration should earn more than the sample of the policy the round started from; ties
    count half. Collectives: every rank must call.
    """
    pairs = heldout_pairs(session, round_index)
    if not pairs:
        return {}
    with session.timed("evaluation"):
        sums = np.array(
            summed(
                score_sequences(
                    session.stepper, pair_sequences(pairs), multiple_of=session.multiple_of
                )
            )
        )
    references = np.array([[p.ref_demo_logp, p.ref_sample_logp] for p in pairs], dtype=np.float64)
    beta = session.recipe.algorithm.beta[round_index]
    rewards = beta * (sums.reshape(-1, 2) - references)
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "reward_accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()),
        "reward_margin": float(margins.mean()),
        "reward_demo": float(rewards[:, 0].mean()),
        "reward_sample": float(rewards[:, 1].mean()),
        "num_pairs": len(pairs),
    }


def heldout_pairs(session: Session, round_index: int) -> list[Pair]:
    """Usable held-out pairs of a round with their reference log-probabilities, if there are any."""
    bank = session.heldout_bank
    if not session.recipe.algorithm.is_pairwise or not bank.complete_chunks(round_index):
        return []
    if not bank.has_references(round_index):
        add_references(session, bank, round_index)
    pairs, _ = usable_pairs(bank.read_round(round_index))
    return pairs


def _sample_numbers(
    session: Session, demonstrations: Sequence[Demonstration], pairs: Sequence[Pair]
) -> dict[str, Any]:
    lengths = [len(pair.sample_ids) for pair in pairs]
    numbers: dict[str, Any] = {
        "sample_length": float(np.mean(lengths)),
        "demo_length": float(np.mean([len(pair.demo_ids) for pair in pairs])),
        "eos_rate": float(np.mean([pair.finish_reason == "stop" for pair in pairs])),
        "num_samples": len(pairs),
    }
    ids = [pair.sample_ids for pair in pairs]
    return numbers | _exact_match(session, demonstrations, ids, "exact_match")


def _example(session: Session, demonstration: Demonstration, ids: np.ndarray) -> dict[str, Any]:
    prompt = demonstration.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    response = session.tokenizer.decode(ids)
    return {"prompt": prompt, "demonstration": demonstration.response, "response": response}


def _exact_match(
    session: Session, demonstrations: Sequence[Demonstration], ids: Sequence[np.ndarray], name: str
) -> dict[str, Any]:
    """Share of records with an ``answer`` whose decoded response equals it, white space apart."""
    asked = [(d, i) for d, i in zip(demonstrations, ids, strict=True) if d.answer is not None]
    if not asked:
        return {}
    decode = session.tokenizer.decode
    right = sum(decode(i).strip() == str(d.answer).strip() for d, i in asked)
    return {name: right / len(asked), f"{name}_count": right, "num_answers": len(asked)}
