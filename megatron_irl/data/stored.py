"""Training items that stay where they are stored until they are asked for."""

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable


@runtime_checkable
class Stored(Protocol):
    """A sequence of items that can be counted without being made.

    Every rank holds the same sequence and knows the size of everything; an item itself is made,
    by ``[]``, on the ranks that train on it.
    """

    def chosen(self, indices: Sequence[int]) -> Self:
        """These of the sequence, in this order, as another one over the same store."""
        ...

    def token_counts(self, *, share_prompts: bool) -> list[int]:
        """Of every item, the tokens a step processes: its responses, and its prompt once or, if
        not shared, for each of them.
        """
        ...

    def keep(self, indices: Sequence[int]) -> None:
        """Make ready what this rank will ask for; the rest may go out of memory. No collective."""
        ...
