"""The pairs of one round in memory: read from the bank once, however many phases ask for them."""

from collections.abc import Sequence

from megatron_irl.data.pair_bank import PairBank
from megatron_irl.types import Pair


class RoundPairs:
    """One round of a bank, read part by part when first asked for.

    What a pass adds to the pairs (references, rewards) it adds to these very objects; ``commit``
    writes a part back, and ``finish`` brings the round's manifest up to date. Every rank holds the
    same pairs, one rank commits.

    Args:
        bank: Where the round is.
        round: Which one.
        parts: Numbers of its parts, ascending and equal on every rank, as the bank's manifest has
            them.

    Example:
        ``open_pairs(bank, 3).all()`` (``megatron_irl.policy.pairs``).
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
            self._read[part] = self.bank.read_part(self.round, part)
        return self._read[part]

    def all(self) -> list[Pair]:
        """All pairs of the round, part after part."""
        return [pair for part in self.parts for pair in self.part(part)]

    def commit(self, part: int) -> None:
        """Write a part back as it is now. On the writing rank only.

        Raises:
            UserError: The disk is full or the folder cannot be written.
        """
        self.bank.write_part(self.round, part, self.part(part))

    def finish(self) -> None:
        """Make the parts written back since the round's own. Collective with a shared bank.

        Waits until every rank has written its parts.
        """
        self.bank.finish_round(self.round)
