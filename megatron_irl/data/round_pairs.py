"""The pairs of a round: their index on every rank, and the pairs that this rank works on."""

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

from megatron_irl.data.pair_bank import PairBank
from megatron_irl.data.pair_index import INDEX
from megatron_irl.types import Pair


class RoundPairs:
    """One round of a bank, read part by part when first asked for.

    A part stays in memory until ``release``. Each replica scores parts of its own
    (``policy.references.score_parts``) and keeps those; what a pass adds to the pairs (references,
    rewards) it adds to these very objects, and ``commit`` writes them back.

    Args:
        bank: Where the round is.
        round: Which one.
        parts: Numbers of its parts, ascending and equal on every rank, as the bank's manifest has
            them.

    Attributes:
        index: A row of ``pair_index.INDEX`` for each pair of the round, part after part; none
            before ``policy.references.index_pairs``.

    Example:
        ::

            pairs = index_pairs(open_pairs(bank, 3), topology)  # policy.references; collective
            items = pairs.rows()                           # all pairs, by their index
            items.keep([4, 7])                             # read on this rank
            items[4].sample_ids
    """

    def __init__(self, bank: PairBank, round: int, parts: Sequence[int] = ()) -> None:
        self.bank, self.round, self.parts = bank, round, tuple(parts)
        self.index = np.zeros(0, INDEX)
        self._read: dict[int, list[Pair]] = {}

    def part(self, part: int) -> list[Pair]:
        """The pairs of a part, in the order written.

        Raises:
            UserError: The part cannot be read.
        """
        # Read once: what a pass adds to the pairs (``commit``) must be added to these objects.
        if part not in self._read:
            self._read[part] = self.bank.read_part(self.round, part)
        return self._read[part]

    def some(self, part: int, rows: Sequence[int]) -> list[Pair]:
        """These pairs of a part; the part stays in memory only if it was there.

        Raises:
            UserError: As ``part``. The whole part is read: its digest is of all of it.
        """
        pairs = self._read.get(part)
        if pairs is None:
            pairs = self.bank.read_part(self.round, part)
        return [pairs[row] for row in rows]

    def release(self, but: Iterable[int] = ()) -> None:
        """Let go of the parts in memory, except some."""
        kept = set(but)
        self._read = {part: pairs for part, pairs in self._read.items() if part in kept}

    def rows(self) -> "PairRows":
        """All pairs of the round as items, by the index."""
        return PairRows([self], np.zeros(len(self.index), np.int32), self.index)

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


class PairRows(Sequence[Pair]):
    """Pairs of one or more rounds by their index (``data.stored.Stored``); ``+`` joins two.

    A pair is read when it is asked for, or before that by ``keep``, which reads each part once.

    Args:
        rounds: The rounds.
        source: int32 [pairs], which of the rounds each pair is of.
        numbers: Their rows of ``pair_index.INDEX``.
        kept: Pairs in memory by round, part and row; shared with what is chosen of these rows.
    """

    def __init__(
        self, rounds: Sequence[RoundPairs], source: np.ndarray, numbers: np.ndarray,
        kept: dict[tuple[int, int, int], Pair] | None = None,
    ) -> None:
        self._rounds, self._source, self.numbers = list(rounds), source, numbers
        self._kept: dict[tuple[int, int, int], Pair] = {} if kept is None else kept

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> "PairRows": ...
    def __getitem__(self, index: int | slice) -> "Pair | PairRows":
        if isinstance(index, slice):
            return self.chosen(np.arange(len(self))[index])
        [(source, part, row)] = self._places([index])
        pair = self._kept.get((source, part, row))
        return self._rounds[source].some(part, [row])[0] if pair is None else pair

    def __add__(self, other: "PairRows") -> "PairRows":
        source = np.concatenate([self._source, other._source + len(self._rounds)])
        numbers = np.concatenate([self.numbers, other.numbers])
        return PairRows(self._rounds + other._rounds, source, numbers)

    def chosen(self, indices: Sequence[int] | np.ndarray) -> "PairRows":
        """These of the pairs, in this order."""
        wanted = np.asarray(indices, np.int64)
        return PairRows(self._rounds, self._source[wanted], self.numbers[wanted], self._kept)

    def read(self) -> list[Pair]:
        """All of them, each part that is not in memory read once and not kept."""
        copy = PairRows(self._rounds, self._source, self.numbers, dict(self._kept))
        copy.keep(range(len(copy)))
        return [copy[index] for index in range(len(copy))]

    def token_counts(self, *, share_prompts: bool) -> list[int]:
        """Of each pair: the prompt, once or twice, demonstration and sample."""
        known, prompts = self.numbers, 1 if share_prompts else 2
        total = prompts * known["prompt_length"] + known["demo_length"] + known["sample_length"]
        return total.tolist()

    def keep(self, indices: Iterable[int]) -> None:
        """Read these pairs, and let go of the others.

        Raises:
            UserError: A part that has one of them is missing or damaged.
        """
        # By place and not by position, as a choice of these rows has positions of its own.
        wanted = set(self._places(sorted(set(indices))))
        for place in self._kept.keys() - wanted:
            del self._kept[place]
        by_part: dict[tuple[int, int], list[int]] = {}
        for source, part, row in sorted(wanted - self._kept.keys()):
            by_part.setdefault((source, part), []).append(row)
        for (source, part), rows in by_part.items():
            pairs = self._rounds[source].some(part, rows)
            self._kept |= {(source, part, row): pair
                           for row, pair in zip(rows, pairs, strict=True)}

    def _places(self, indices: Sequence[int]) -> list[tuple[int, int, int]]:
        where = np.asarray(indices, np.int64)
        part, row = self.numbers["part"][where], self.numbers["row"][where]
        return list(zip(self._source[where].tolist(), part.tolist(), row.tolist(), strict=True))
