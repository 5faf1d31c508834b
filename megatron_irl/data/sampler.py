"""The order in which data is visited: reshuffled every epoch, resumable from one number."""

import functools

import numpy as np


class OrderedSampler:
    """An endless sequence of ordinals, a pure function of (seed, position).

    Every epoch is a fresh permutation of ``range(num_items)``; consecutive ``take`` calls are
    disjoint slices of it, and what is left at an epoch's end opens the next slice: nothing is
    dropped. All ranks hold the same sampler and take the same slices.

    Args:
        num_items: More than 0.
        seed: 0 or more.
        position: Items taken before, by this sampler or by one of the same items and seed.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(self, num_items: int, seed: int, position: int = 0) -> None:
        if num_items <= 0:
            raise ValueError(f"num_items={num_items} must be positive")
        if position < 0:
            raise ValueError(f"position={position} must not be negative")
        self.num_items, self.seed, self.position = num_items, seed, position

    def take(self, n: int) -> list[int]:
        """Return the next ``n`` ordinals and move on; may cross into following epochs."""
        taken: list[int] = []
        while len(taken) < n:
            epoch, offset = divmod(self.position, self.num_items)
            order = _epoch_order(self.num_items, self.seed, epoch)
            part = order[offset : offset + n - len(taken)]
            taken.extend(part.tolist())
            self.position += len(part)
        return taken


def order_seed(seed: int, round: int, phase: int) -> int:
    """The seed of the order in which a phase visits its items, in [0, 2**31).

    Args:
        seed: Of the run.
        round: In which the items were drawn; 0 for those that outlast their round.
        phase: 0 for a round's first phase, 1 for later ones.
    """
    words = np.random.SeedSequence(seed, spawn_key=(round, phase)).generate_state(1, np.uint32)
    return int(words[0]) >> 1


# A step asks for a slice of one permutation of all items, the next step for the next slice. Two
# streams that each cross an epoch's end are four.
@functools.lru_cache(maxsize=4)
def _epoch_order(num_items: int, seed: int, epoch: int) -> np.ndarray:
    bits = np.random.MT19937(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    # RandomState, because numpy promises its stream never changes: a run resumed under a newer
    # numpy sees the same order. Generator carries no such promise.
    return np.random.RandomState(bits).permutation(num_items)
