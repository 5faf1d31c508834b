"""The pairs of one round in memory: read from the bank once, however many phases ask for them."""

from collections.abc import Sequence

from megatron_irl.data.pair_bank import PairBank
from megatron_irl.types import Pair


class RoundPairs:
    """One round of a bank, read part by part when first asked for.

    What a pass adds to the pairs (references, rewards) it adds to these very objects; ``commit``
    writes a part back. Every rank holds the same pairs, one rank commits.

    Args:
        bank: Where the round is.
        round: Which one.
        parts: Numbers of its parts, ascending and equal on every rank: whoever makes the object
            asks one rank for them, since two looks at a shared folder may differ.

    Example:
        ``open_pairs(bank, 3, topology).all()`` (``megatron_irl.policy.pairs``).
    """

    def __init__(self, bank: PairBank, round: int, parts: Sequence[int] = ()) -> None:
        self.bank, self.round, self.parts = bank, round, tuple(parts)
        self._read: dict[int, list[Pair]] = {}

    def part(self, part: int) -> list[Pair]:
        """The pairs of a part, in the order written.

        Raises:
            UserError: The part cannot be read.
        """
        if part not in self._read:
            self._read[part] = self.bank.read_chunk(self.round, part)
        return self._read[part]

    def all(self) -> list[Pair]:
        """All pairs of the round, part after part."""
        return [pair for part in self.parts for pair in self.part(part)]

    def commit(self, part: int) -> None:
        """Write a part back as it is now. On the writing rank only.

        Raises:
            UserError: The disk is full or the folder cannot be written.
        """
        self.bank.write_chunk(self.round, part, self.part(part))
