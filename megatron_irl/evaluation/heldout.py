"""Held-out evaluation: likelihood, reward, preferences, exact match, length and EOS rate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_irl.algorithms.rules import AlgorithmRules
from megatron_irl.config import Recipe
from megatron_irl.console import Console
from megatron_irl.data.answers import same_answer
from megatron_irl.data.corpus import Corpus
from megatron_irl.data.digest import digest_of
from megatron_irl.data.pair_index import usable_pairs
from megatron_irl.data.round_pairs import RoundPairs
from megatron_irl.data.token_table import ids_of
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.evaluation.rewards import raw_scores, reward_numbers
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.parallel.agreement import stop_if_asked
from megatron_irl.parallel.main_rank import everywhere, on_main
from megatron_irl.policy.pairs import generate, sample_pairs
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.references import add_references, open_pairs, read_parts
from megatron_irl.policy.scoring import Sequences, distinct_sequences
from megatron_irl.storage.commit import checked_json, read_json, write_file
from megatron_irl.storage.shared_bank import SharedBank
from megatron_irl.timing import Clock
from megatron_irl.types import Demonstration, Pair

GREEDY_SEED = 0  # greedy generation draws nothing
HELDOUT_STREAM = 1 << 20  # keeps held-out sampling seeds apart from those of training parts


@dataclass
class Evaluator:
    """Judges a policy on what it does not train on. Knows the policy and data, not the run.

    Attributes:
        recipe: Resolved; sections ``evaluation``, ``generation``, ``logging`` and ``algorithm``.
        rules: The algorithm's; they say what its reward is.
        bank: Held-out samples, by the round whose reward they judge.
        preference_references: File that keeps the starting weights' log-probabilities of the
            held-out preferences.
        scheme: How samples are drawn; see ``sample_pairs``.

    Collectives: every rank must call every method.
    """

    recipe: Recipe
    rules: AlgorithmRules
    policy: Policy
    tokenizer: Tokenizer
    data: Corpus
    sampling: SamplingConfig
    bank: SharedBank
    preference_references: Path
    console: Console
    clock: Clock
    scheme: int = 2
    _opened: RoundPairs | None = None  # the held-out pairs asked for last, read from disk once

    def evaluate(self, next_round: int) -> dict[str, Any]:
        """Evaluate the weights as they are: ``numbers``, and ``examples`` of responses.

        Fresh samples of the held-out prompts go to the held-out bank as those of ``next_round``:
        the next round's reward is judged on them, since its reference is this very policy.
        """
        demonstrations, options = self.data.heldout, self.recipe.evaluation
        if not demonstrations:
            return {}
        with self.clock.timed("evaluation"):
            sequences = list(ids_of(demonstrations))
            logps = self.policy.score_sums(sequences).logp
            num_tokens = sum(len(response) for _, response in sequences)
            numbers: dict[str, Any] = {
                "nll": -sum(logps.tolist()) / num_tokens,
                "nll_tokens": num_tokens,
                "num_demonstrations": len(demonstrations),
            }
            subset = demonstrations[: options.limit]
            ids: list[np.ndarray] = []
            if options.samples:
                pairs = self._sample(next_round, subset)
                ids = [pair.sample_ids for pair in pairs]
                numbers |= self._sample_numbers(subset, pairs)
            if options.greedy and any(d.answer is not None for d in subset):
                ids = self._greedy_ids(subset)
                numbers |= self._exact_match(subset, ids, "greedy_exact_match")
            shown = self.recipe.logging.samples
            examples = [self._example(d, i) for d, i in zip(subset[:shown], ids, strict=False)]
        return {"numbers": numbers, "examples": examples}

    def cache_references(self, round_index: int, weights_of: Path | None) -> None:
        """Store the reference log-probabilities of a round's held-out pairs, unless they are there.

        At the round's start, when the policy may be its own reference.

        Args:
            weights_of: As of ``add_references``.
        """
        if self.rules.reward != "implicit":
            return
        pairs = self._pairs(round_index)
        if pairs.parts and not self.bank.has_references(round_index):
            with self.console.about("held out"):
                add_references(self.policy, pairs, weights_of=weights_of, console=self.console,
                               clock=self.clock)

    def judge_reward(self, round_index: int, weights_of: Path | None) -> dict[str, Any]:
        """The reward on held-out demonstrations and preferences, explicit or implicit.

        A demonstration should earn more than the sample of the policy the round started from, and a
        chosen response more than the rejected one; ties count half.

        Args:
            weights_of: As of ``cache_references``, for a run whose references are missing.
        """
        if self.rules.reward == "none":
            return {}
        self.cache_references(round_index, weights_of)
        pairs = usable_pairs(self._read(round_index))
        numbers: dict[str, Any] = {}
        with self.clock.timed("evaluation"):
            if pairs:
                sequences, places = distinct_sequences(pairs)
                scores = self._scores(sequences)
                rewards = [scores[place] for place in places]
                references: list[Any] = [[p.ref_demo_logp, p.ref_sample_logp] for p in pairs]
                lengths = [[len(p.demo_ids), len(p.sample_ids)] for p in pairs]
                numbers |= self._reward_numbers(rewards, references, lengths, round_index) | {
                    "num_pairs": len(pairs)
                }
            preferences = self.data.heldout_preferences
            if preferences:
                scores = self._scores(self._preference_sequences())
                references = self._preference_references()
                lengths = [[len(p.chosen_ids), len(p.rejected_ids)] for p in preferences]
                found = self._reward_numbers(scores, references, lengths, round_index)
                numbers |= {
                    "preference_accuracy": found["reward_accuracy"],
                    "preference_margin": found["reward_margin"],
                    "num_preferences": len(preferences),
                }
        return numbers

    def _sample(self, round_index: int, demonstrations: Sequence[Demonstration]) -> list[Pair]:
        with self.console.about("held out"):
            sample_pairs(
                self.policy, self.bank, round_index, demonstrations, sampling=self.sampling,
                part_size=self.recipe.generation.part_size, stream=HELDOUT_STREAM,
                scheme=self.scheme, console=self.console, clock=self.clock,
            )
        self._opened = None  # what was read of the round before is not these
        return self._read(round_index)

    def _pairs(self, round_index: int) -> RoundPairs:
        """A round's held-out pairs; none where nothing was sampled for it."""
        if self._opened is None or self._opened.round != round_index:
            self._opened = open_pairs(self.bank, round_index)
        return self._opened

    def _read(self, round_index: int) -> list[Pair]:
        """All of a round's held-out pairs. Collective: what one rank cannot read none scores."""
        topology, pairs = self.policy.topology, self._pairs(round_index)
        parts = everywhere(lambda: list(read_parts(pairs, pairs.parts, topology)), topology)
        return [pair for _, part in parts for pair in part]

    def _scores(self, sequences: Sequences) -> list[float]:
        return raw_scores(self.policy, self.rules.reward, sequences)

    def _reward_numbers(
        self, scores: list[float], references: list[Any], lengths: list[list[int]],
        round_index: int,
    ) -> dict[str, float]:
        algorithm = self.recipe.algorithm
        return reward_numbers(
            self.rules.reward, scores, references, lengths, beta=algorithm.beta[round_index],
            length_normalize=algorithm.length_normalize,
        )

    def _preference_sequences(self) -> Sequences:
        """[chosen_0, rejected_0, chosen_1, ...] of the held-out preferences."""
        return [
            (preference.prompt_ids, response)
            for preference in self.data.heldout_preferences
            for response in (preference.chosen_ids, preference.rejected_ids)
        ]

    def _preference_references(self) -> list[Any]:
        """Log-probabilities of the held-out preferences under the weights the run began with.

        Computed at the first call and kept in a file, until the preferences change. An explicit
        reward needs none.
        """
        if self.rules.reward == "explicit":
            return []
        path, topology = self.preference_references, self.policy.topology
        sequences = self._preference_sequences()
        digest = digest_of(sequences)
        # Rank 0's look: whether they are computed, which is collective, must not differ by rank.
        kept: Any = on_main(lambda: read_json(path), topology)
        if not isinstance(kept, dict) or kept.get("digest") != digest:
            with self.policy.with_weights_of(Path(self.recipe.model.hf)):
                kept = {"digest": digest, "logps": self._scores(sequences)}
            text = checked_json(kept)
            on_main(lambda: write_file(path, text), topology)
        return np.array(kept["logps"]).reshape(-1, 2).tolist()

    def _sample_numbers(
        self, demonstrations: Sequence[Demonstration], pairs: Sequence[Pair]
    ) -> dict[str, Any]:
        lengths = [len(pair.sample_ids) for pair in pairs]
        numbers: dict[str, Any] = {
            "sample_length": float(np.mean(lengths)),
            "demo_length": float(np.mean([len(pair.demo_ids) for pair in pairs])),
            "eos_rate": float(np.mean([pair.finish_reason == "stop" for pair in pairs])),
            "num_samples": len(pairs),
        }
        ids = [pair.sample_ids for pair in pairs]
        return numbers | self._exact_match(demonstrations, ids, "exact_match")

    def _example(self, demonstration: Demonstration, ids: np.ndarray) -> dict[str, Any]:
        prompt = demonstration.prompt
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        response = self._response_text(demonstration, ids)
        return {"prompt": prompt, "demonstration": demonstration.response, "response": response}

    def _response_text(self, demonstration: Demonstration, ids: np.ndarray) -> str:
        return self.tokenizer.response_text(
            demonstration.prompt_ids, ids, plain=isinstance(demonstration.prompt, str))

    def _greedy_ids(self, demonstrations: Sequence[Demonstration]) -> list[np.ndarray]:
        """Token ids of the likeliest responses, some at a time: scratch grows with a call."""
        size = self.recipe.generation.part_size
        greedy = replace(self.sampling, seed=GREEDY_SEED, temperature=0.0)
        ids: list[np.ndarray] = []
        with self.clock.timed("generation"), self.console.about("held out, greedy"):
            for start in range(0, len(demonstrations), size):
                stop_if_asked(self.policy.topology)
                prompts = [d.prompt_ids for d in demonstrations[start : start + size]]
                samples = generate(self.policy, prompts, greedy, self.console)
                ids += [sample.token_ids for sample in samples]
            self.policy.release_cache()
        return ids

    def _exact_match(
        self, demonstrations: Sequence[Demonstration], ids: Sequence[np.ndarray], name: str
    ) -> dict[str, Any]:
        """Share of records with an ``answer`` whose response is that text or number."""
        asked = [(d, i) for d, i in zip(demonstrations, ids, strict=True) if d.answer is not None]
        if not asked:
            return {}
        right = sum(same_answer(self._response_text(d, i), str(d.answer)) for d, i in asked)
        return {name: right / len(asked), f"{name}_count": right, "num_answers": len(asked)}
