"""Held-out evaluation: likelihood, reward, preferences, exact match, length and EOS rate."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_irl.data.digest import digest_of
from megatron_irl.data.pair_bank import usable_pairs
from megatron_irl.objectives.irft import implicit_rewards
from megatron_irl.parallel.reduce import from_main
from megatron_irl.policy.scoring import score_rewards, score_sequences, summed
from megatron_irl.run.rounds import (
    add_references,
    generate,
    initial_weights,
    sample_pairs,
    score_distinct,
)
from megatron_irl.run.session import Session
from megatron_irl.storage.commit import replacing
from megatron_irl.train.batches import Sequences
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
            ids = _greedy_ids(session, subset)
            numbers |= _exact_match(session, subset, ids, "greedy_exact_match")
        shown = session.recipe.logging.samples
        examples = [_example(session, d, i) for d, i in zip(subset[:shown], ids, strict=False)]
    return {"numbers": numbers, "examples": examples}


def evaluate_reward(session: Session, round_index: int) -> dict[str, Any]:
    """The reward on held-out demonstrations and preferences, explicit for rft, else implicit.

    A demonstration should earn more than the sample of the policy the round started from, and a
    chosen response more than the rejected one; ties count half.
    Collectives: every rank must call.
    """
    pairs = heldout_pairs(session, round_index)
    numbers: dict[str, Any] = {}
    with session.timed("evaluation"):
        if pairs:
            rewards = score_distinct(pairs, lambda sequences: _scores(session, sequences))
            references: list[Any] = [[p.ref_demo_logp, p.ref_sample_logp] for p in pairs]
            lengths = [[len(p.demo_ids), len(p.sample_ids)] for p in pairs]
            numbers |= _reward_numbers(session, rewards, references, lengths, round_index) | {
                "num_pairs": len(pairs)
            }
        preferences = session.heldout_preferences
        if preferences:
            scores = _scores(session, preference_sequences(session))
            references = preference_references(session)
            lengths = [[len(p.chosen_ids), len(p.rejected_ids)] for p in preferences]
            found = _reward_numbers(session, scores, references, lengths, round_index)
            numbers |= {
                "preference_accuracy": found["reward_accuracy"],
                "preference_margin": found["reward_margin"],
                "num_preferences": len(preferences),
            }
    return numbers


def heldout_pairs(session: Session, round_index: int) -> list[Pair]:
    """Usable held-out pairs of a round, with references where the reward needs them."""
    bank, algorithm, topology = session.heldout_bank, session.recipe.algorithm, session.topology
    if not algorithm.is_pairwise:
        return []
    found = (
        (bool(bank.complete_chunks(round_index)), bank.has_references(round_index))
        if topology.is_main else None
    )  # asked once: what follows is collective
    has_pairs, has_references = from_main(found, topology)
    if not has_pairs:
        return []
    if algorithm.name != "rft" and not has_references:
        add_references(session, bank, round_index)
    pairs, _ = usable_pairs(bank.read_round(round_index))
    return pairs


def preference_sequences(session: Session) -> Sequences:
    """[chosen_0, rejected_0, chosen_1, ...] of the held-out preferences as (prompt, response)."""
    return [
        (preference.prompt_ids, response)
        for preference in session.heldout_preferences
        for response in (preference.chosen_ids, preference.rejected_ids)
    ]


def preference_references(session: Session) -> list[Any]:
    """Log-probabilities of the held-out preferences under the weights the run began with.

    Computed at the run's first call and kept in its folder, until the preferences change. Not for
    rft, whose reward needs none. Collectives: every rank must call.
    """
    if session.recipe.algorithm.name == "rft" or not session.heldout_preferences:
        return []
    path, topology = session.folder.preference_references, session.topology
    sequences = preference_sequences(session)
    digest = digest_of(sequences)
    kept = json.loads(path.read_text()) if topology.is_main and path.exists() else None
    kept = from_main(kept, topology)
    if not isinstance(kept, dict) or kept.get("digest") != digest:
        with initial_weights(session):
            kept = {"digest": digest, "logps": _scores(session, sequences)}
        if topology.is_main:
            with replacing(path) as file:
                file.write(json.dumps(kept).encode())
    return np.array(kept["logps"]).reshape(-1, 2).tolist()


def _scores(session: Session, sequences: Sequences) -> list[float]:
    """Explicit rewards for rft; else summed log-probabilities, still without their reference."""
    if session.recipe.algorithm.name == "rft":
        return score_rewards(session.stepper, sequences, multiple_of=session.multiple_of)
    return summed(score_sequences(session.stepper, sequences, multiple_of=session.multiple_of))


def _reward_numbers(
    session: Session, scores: list[float], references: list[Any], lengths: list[list[int]],
    round_index: int,
) -> dict[str, float]:
    """Accuracy, margin and means of [better_0, worse_0, better_1, ...].

    ``references`` (not used for rft) and ``lengths`` in tokens have a row of two per pair.
    """
    rewards = np.array(scores, dtype=np.float64).reshape(-1, 2)
    algorithm = session.recipe.algorithm
    if algorithm.name != "rft":
        rewards = implicit_rewards(
            rewards, np.array(references, dtype=np.float64), np.array(lengths),
            beta=algorithm.beta[round_index], length_normalize=algorithm.length_normalize,
        )
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "reward_accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()),
        "reward_margin": float(margins.mean()),
        "reward_demo": float(rewards[:, 0].mean()),
        "reward_sample": float(rewards[:, 1].mean()),
    }


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


def _greedy_ids(session: Session, demonstrations: Sequence[Demonstration]) -> list[np.ndarray]:
    """Token ids of the likeliest responses, generated in chunks: scratch grows with a call."""
    size = session.recipe.generation.chunk_size
    ids: list[np.ndarray] = []
    with session.timed("generation"):
        for start in range(0, len(demonstrations), size):
            prompts = [d.prompt_ids for d in demonstrations[start : start + size]]
            samples = generate(session, prompts, seed=GREEDY_SEED, temperature=0.0)
            ids += [sample.token_ids for sample in samples]
        session.generator.close()
    return ids


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
