"""What the ranks of the SmolLM2 test run; importable by name."""

from typing import Any

import numpy as np

from megatron_irl.generation import SamplingConfig
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.policy.policy import Policy
from tests.dist.jobs import Layout, build

Responses = list[tuple[list[int], list[float], list[float]]]


def generate_and_score(
    hf: str, layout: Layout, prompts: list[np.ndarray], samplings: list[dict[str, Any]]
) -> list[Responses]:
    """Per sampling, per prompt: token ids, the engine's log-probabilities, the trainer's."""
    topology, chunks, _, architecture = build(hf, layout)
    options = [SamplingConfig(**sampling) for sampling in samplings]
    longest = max(map(len, prompts)) + max(o.max_new_tokens for o in options)
    with MegatronGenerator(
        chunks, topology, max_sequence_length=longest, vocab_size=architecture.vocab_size
    ) as generator:
        drawn = [generator.generate(prompts, o) for o in options]
    policy = Policy(chunks, topology, architecture)
    results = []
    for samples in drawn:
        pairs = [(p, s.token_ids) for p, s in zip(prompts, samples, strict=True)]
        scores = policy.score(pairs)
        results.append([
            (s.token_ids.tolist(), s.logprobs.tolist(), score.tolist())
            for s, score in zip(samples, scores, strict=True)
        ])
    return results
