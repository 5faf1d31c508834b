"""Losses far above what the last steps had. Pure: no clock, no files, no collectives."""

from collections import deque

import numpy as np

_WINDOW, _FEWEST = 20, 10  # losses that are looked back at, and fewer say nothing
_FLOOR = 0.02  # of the median: a loss that hardly moves is no reason to call noise a spike


class SpikeGuard:
    """Compares each loss with those before it in the same phase of a round.

    A spike is more than ``factor`` robust standard deviations (from the median absolute deviation)
    above the median. After one the guard begins anew, so that a level shift is said once.
    """

    def __init__(self, factor: float = 6.0) -> None:
        self.factor = factor
        self._phase = ""
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def start_round(self) -> None:
        """Forget the losses of the previous round."""
        self._losses.clear()

    def feed(self, loss: float | None, phase: str = "") -> str | None:
        """Take a step's loss; a sentence if it is a spike. What is not finite is passed over."""
        if phase != self._phase:
            self._phase = phase
            self._losses.clear()
        if loss is None or not np.isfinite(loss):
            return None
        before = np.array(self._losses)
        self._losses.append(loss)
        if len(before) < _FEWEST:
            return None
        median = float(np.median(before))
        spread = max(1.4826 * float(np.median(np.abs(before - median))), _FLOOR * abs(median))
        if loss - median <= self.factor * spread:
            return None
        self._losses.clear()
        return (f"the loss is {loss:.4g} where the last {len(before)} steps had {median:.4g} give "
                f"or take {spread:.2g}")
