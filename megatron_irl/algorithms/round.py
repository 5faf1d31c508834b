"""What the phases of a round work with."""

from dataclasses import dataclass
from pathlib import Path

from megatron_irl.config import Recipe
from megatron_irl.console import Console
from megatron_irl.data.corpus import Corpus
from megatron_irl.data.round_pairs import RoundPairs
from megatron_irl.policy.policy import Policy
from megatron_irl.storage.shared_bank import SharedBank
from megatron_irl.timing import Clock


@dataclass(frozen=True)
class Round:
    """A round on this rank, handed to ``Phase.prepare``.

    Attributes:
        recipe: Resolved.
        index: Of the round, from 0.
        policy: Scores and generates; nothing here updates it.
        data: What the user gave to train on.
        pairs: The round's pairs, with references; empty for an algorithm that draws no samples.
        previous_bank: Where pairs of an earlier round are kept with references of this one.
        ledger: Folder of the demonstrations' rewards.
        reference_weights: HF folder that the reference policy's weights come from; None while the
            policy is its own reference.
        console, clock: Where progress is shown, and time counted.
    """

    recipe: Recipe
    index: int
    policy: Policy
    data: Corpus
    pairs: RoundPairs
    previous_bank: SharedBank
    ledger: Path
    reference_weights: Path | None
    console: Console
    clock: Clock
