"""The order in which data is visited: reshuffled every epoch, resumable from one number."""

import numpy as np


class OrderedSampler:
    """An endless sequence of ordinals, a pure function of (seed, position).

    Every epoch is a fresh permutation of ``range(num_items)``; consecutive ``take`` calls are
    disjoint slices of it, and what is left at an epoch's end opens the next slice: nothing is
    dropped. All ranks hold the same sampler and take the same slices.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        """Raises ValueError unless num_items > 0 and seed >= 0."""
        if num_items <= 0:
            raise ValueError(f"num_items={num_items} must be positive")
        self.num_items = num_items
        self.seed = seed
        self.position = 0
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def epoch(self) -> int:
        """Epoch of the next item, from 0."""
        return self.position // self.num_items

    def take(self, n: int) -> list[int]:
        """Return the next ``n`` ordinals and move on; may cross into following epochs."""
        taken: list[int] = []
        while len(taken) < n:
            epoch, offset = divmod(self.position, self.num_items)
            part = self._epoch_order(epoch)[offset : offset + n - len(taken)]
            taken.extend(part.tolist())
            self.position += len(part)
        return taken

    def state_dict(self) -> dict[str, int]:
        """Return the position; num_items and seed belong to the recipe."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position saved by a sampler of the same num_items and seed."""
        position = int(state["position"])
        if position < 0:
            raise ValueError(f"position={position} must not be negative")
        self.position = position

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            bits = np.random.MT19937(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
            # RandomState, because numpy promises its stream never changes: a run resumed under
            # a newer numpy sees the same order. Generator carries no such promise.
            self._order = np.random.RandomState(bits).permutation(self.num_items)
            self._epoch = epoch
        return self._order
