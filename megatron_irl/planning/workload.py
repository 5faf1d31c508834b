"""What a recipe's rounds consist of: sequences by their lengths, packed as training packs them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_irl.algorithms.base import Algorithm, Phase
from megatron_irl.config import Recipe
from megatron_irl.data.balance import assign, assign_by_tokens
from megatron_irl.flops import Tokens

_DRAWS = 16  # steps whose packs are looked at


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts, demonstrations and samples, an entry a record; all of one size.

    Attributes:
        records: How many demonstrations there are, of which these may be a sample.
        origin: Where they come from, in words.
    """

    prompt: np.ndarray
    response: np.ndarray
    sample: np.ndarray
    records: int
    origin: str

    @classmethod
    def equal(cls, prompt: int, response: int, records: int, origin: str) -> "Lengths":
        """All prompts and all responses of one length."""
        ones = np.ones(1, np.int64)
        return cls(prompt * ones, response * ones, response * ones, records, origin)


@dataclass(frozen=True)
class PhaseWork:
    """The steps of one phase of a round.

    Attributes:
        packs: Of one data-parallel rank in a typical step, in order.
        largest: Packs of those drawn of which one takes most memory, the one with most tokens and
            the one with most places in attention, and
        worst: likewise of those that could be.
        has_head: Whether the language-model head runs.
    """

    name: str
    steps: int
    packs: tuple[Tokens, ...]
    largest: tuple[Tokens, ...]
    worst: tuple[Tokens, ...]
    has_head: bool


@dataclass(frozen=True)
class Workload:
    """A round.

    Attributes:
        of_a_prompt: What the reference pass scores for a prompt of mean length: demonstration and
            samples.
    """

    phases: tuple[PhaseWork, ...]
    rounds: int
    prompts: int
    samples_per_prompt: int
    lengths: Lengths
    of_a_prompt: Tokens

    @property
    def samples(self) -> int:
        """Responses that a round samples."""
        return self.prompts * self.samples_per_prompt

def workload_of(
    recipe: Recipe, algorithm: Algorithm, lengths: Lengths, data_parallel_size: int
) -> Workload:
    """The rounds of a resolved recipe.

    Args:
        lengths: Of the demonstrations, or of some of them.
    """
    phases = [
        _phase_work(recipe, phase, lengths, data_parallel_size)
        for phase in algorithm.phases(recipe) if phase.last > phase.first
    ]
    draws = algorithm.draws_samples
    samples = algorithm.samples_per_prompt(recipe) if draws else 0
    prompt, response, sample = (
        round(float(n.mean())) for n in (lengths.prompt, lengths.response, lengths.sample))
    together = [(prompt, response), *[(prompt, sample)] * samples]
    return Workload(
        tuple(phases), recipe.algorithm.rounds,
        (recipe.algorithm.prompts_per_round or 0) if draws else 0, samples, lengths,
        Tokens.of(together, sharing=len(together) if recipe.train.share_prompts else 1),
    )


def _phase_work(
    recipe: Recipe, phase: Phase, lengths: Lengths, data_parallel_size: int
) -> PhaseWork:
    train, rng = recipe.train, np.random.default_rng(recipe.seed)
    size, drawn = train.global_batch_size, []
    sharing = phase.sequences_per_item if train.share_prompts else 1
    for _ in range(_DRAWS):
        chosen = rng.integers(0, len(lengths.prompt), size)
        items = [_sequences(lengths, int(i), phase.sequences_per_item) for i in chosen]
        totals = [Tokens.of(item, sharing=sharing).sum for item in items]
        if train.micro_batch_tokens is None:
            bins = assign(totals, size // train.micro_batch_size, train.micro_batch_size)
        else:
            bins = assign_by_tokens(totals, train.micro_batch_tokens, data_parallel_size)
        drawn.append([Tokens.of((s for i in one for s in items[i]), sharing=sharing)
                      for one in bins])
    typical = sorted(drawn, key=lambda packs: sum(p.sum for p in packs))[_DRAWS // 2]
    packs = [pack for packs in drawn for pack in packs]
    largest = (max(packs, key=lambda pack: pack.sum), max(packs, key=lambda pack: pack.whole))
    return PhaseWork(
        phase.name, phase.last - phase.first, tuple(typical[::data_parallel_size]), largest,
        (*largest, *_longest(recipe, phase.sequences_per_item, sharing)),
        phase.heads != "rewards",
    )


def _longest(recipe: Recipe, sequences: int, sharing: int) -> list[Tokens]:
    """Packs of nothing but items as long as the limits allow, and of long prompts alone."""
    train, prompt = recipe.train, recipe.data.max_prompt_length
    longest = max(recipe.data.max_response_length, recipe.generation.max_new_tokens or 0)
    found = []
    for response in (longest, min(8, longest)):
        item = [(prompt, response)] * sequences
        count = train.micro_batch_size
        if train.micro_batch_tokens is not None:
            count = max(1, train.micro_batch_tokens // Tokens.of(item, sharing=sharing).sum)
        found.append(Tokens.of(item * count, sharing=sharing))
    return found


def _sequences(lengths: Lengths, i: int, count: int) -> Sequence[tuple[int, int]]:
    """(prompt, response) tokens of an item: a pair's two, or a single one."""
    prompt = int(lengths.prompt[i])
    responses = [int(lengths.response[i]), int(lengths.sample[i])][:count]
    return [(prompt, response) for response in responses]
