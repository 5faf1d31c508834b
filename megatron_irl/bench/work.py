"""What a benchmark works on, the same for us and for a peer: the case, and random pairs."""

from dataclasses import dataclass

import numpy as np

from megatron_irl import hardware
from megatron_irl.config import Recipe
from megatron_irl.errors import UserError
from megatron_irl.run.speed import memory_peaks
from megatron_irl.types import Pair


@dataclass(frozen=True)
class Range:
    """Lengths are drawn between two numbers of tokens, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "Range":
        """Of ``N`` or ``LOW-HIGH``."""
        numbers = text.split("-")
        if len(numbers) > 2 or not all(n.isdigit() and int(n) > 0 for n in numbers):
            raise UserError(f"{text!r} is no length: --lengths is PROMPT,RESPONSE, each a number "
                            "of tokens or LOW-HIGH, as in 256-512,128.")
        values = [int(n) for n in numbers]
        if values[0] > values[-1]:
            raise UserError(f"--lengths has {text}, whose first number is the larger one.")
        return cls(values[0], values[-1])

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def parse_lengths(text: str) -> tuple[Range, Range]:
    """(prompt, response) of ``--lengths``."""
    parts = text.split(",")
    if len(parts) != 2:
        raise UserError(f"--lengths {text} is not PROMPT,RESPONSE, as in 256-512,256-512.")
    return Range.parse(parts[0]), Range.parse(parts[1])


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        requests: Prompts of a generation, over all replicas.
        steps, warmup: Repeats that count, and those before them.
        ragged: Sample with unequal budgets too, beside equal ones of the same sum.
    """

    recipe: Recipe
    prompt: Range
    response: Range
    requests: int
    steps: int
    warmup: int
    ragged: bool = False


class PhaseMemory:
    """Peaks of memory phase by phase; begun before the model is there."""

    def __init__(self) -> None:
        hardware.reset_peak_process_memory()
        self._before = hardware.process_memory()

    def begin(self) -> None:
        """A phase begins."""
        hardware.reset_peak_memory()
        hardware.reset_peak_process_memory()

    def peaks(self) -> dict[str, float]:
        """Of the phase, GiB. On a CPU ``memory/peak_added`` is what the process has had beyond its
        libraries, as a GPU's ``memory/peak_allocated`` counts none either.
        """
        found = memory_peaks()
        if (whole := found.get("memory/peak_process")) is not None:
            found["memory/peak_added"] = whole - self._before / 2**30
        return found


def random_pairs(
    vocab_size: int, count: int, prompt: Range, response: Range, *, seed: int
) -> list[Pair]:
    """Pairs of random ids; the references are what a cached one might be."""
    rng = np.random.default_rng(seed)

    def ids(lengths: Range) -> np.ndarray:
        size = rng.integers(lengths.low, lengths.high + 1)
        return rng.integers(3, vocab_size, size).astype(np.int32)

    return [
        Pair(i, ids(prompt), ids(response), ids(response), np.zeros(1, np.float32), "stop",
             ref_demo_logp=-50.0, ref_sample_logp=-50.0)
        for i in range(count)
    ]
