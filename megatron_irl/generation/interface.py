"""What the training loop asks of a text generator; any engine that answers it can be used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_irl.errors import UserError
from megatron_irl.types import Sample

Progress = Callable[[int, int], None]
Finished = Callable[[int, Sample], None]
Ends = Callable[[int, np.ndarray], bool]

SAMPLES_PER_PROMPT = 1 << 20  # bound of the sample's index in a request's key


def request_key(ordinal: int, sample: int) -> int:
    """The key of one sample of one prompt: different for all of a round's samples.

    Args:
        ordinal: The prompt's number in its data.
        sample: The sample's number among those of the prompt, less than 2^20.
    """
    return ordinal * SAMPLES_PER_PROMPT + sample


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample.

    Attributes:
        temperature: 0 is greedy; 1 is the policy itself.
        top_p: Nucleus mass in (0, 1]; 1 keeps everything. Applied after ``top_k``.
        top_k: Candidates kept; 0 keeps everything.
        max_new_tokens: Budget per response, EOS included.
        seed: Together with a prompt's key, the only source of randomness.
        eos_id: The id that ends a response; part of the response.
        stop_ids: Further ids that end a response in the same way.

    Raises:
        UserError: A value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int = 0
    eos_id: int = 2
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature >= 0.0, "at least 0 (0 is greedy)"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps every token)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**64, "in [0, 2^64)"),
        )
        for name, holds, rule in rules:
            if not holds:
                value = getattr(self, name)
                raise UserError(f"generation.{name}={value} is out of range; it must be {rule}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def stop_set(self) -> frozenset[int]:
        return frozenset((self.eos_id, *self.stop_ids))


class Generator(Protocol):
    """Prompts in, samples out, in the same order."""

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        on_progress: Progress | None = None,
        *,
        keys: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        max_new_tokens: Sequence[int] | None = None,
        on_finished: Finished | None = None,
        ends: Ends | None = None,
    ) -> list[Sample]:
        """Sample one response per prompt.

        Requests are taken up in the order given, as earlier ones make room; a caller that wants
        the accelerator full gives all it has at once.

        Args:
            prompts: int32 token ids, none empty.
            sampling: One setting for all prompts.
            on_progress: Called after every engine step with (responses finished, tokens so far).
            keys: One non-negative integer per prompt (its position by default). The randomness of
                a response is a function of (seed, key, position) alone, so with global ordinals as
                keys neither batching nor the data-parallel split changes a sample.
            seeds: One seed per prompt, instead of ``sampling.seed``.
            max_new_tokens: Budgets per prompt, instead of ``sampling.max_new_tokens``.
            on_finished: Called with a prompt's position and its sample as soon as that is complete,
                in the same order on every rank of a replica.
            ends: Called with a prompt's position and its tokens so far whenever more of them have
                come to the host; True ends the response there. Tokens may come several at a time.
                Equal on every rank of a replica. No other response changes.

        Returns:
            Samples whose log-probabilities are of the untempered, unfiltered policy.

        Raises:
            UserError: A prompt is empty, or too long for the budget.

        Collectives: every rank of a model replica calls with equal arguments and gets the result.
        """
        ...

    def pause(self) -> None:
        """End a phase of generation: free the cache, unless there is room for it beside training.

        Collectives: every rank of a model replica must call.
        """
        ...

    def close(self) -> None:
        """Free the cache, and all else that generation holds."""
        ...
