"""Signs of progress of this rank: what it is at, and when it last got on."""

import contextlib
import time
from collections.abc import Iterator


class Heartbeat:
    """Written by whoever gets on, read by the watchdog's thread; plain attributes, no lock.

    Attributes:
        phase: What the rank is at.
        is_slow: The phase gives no signs while it lasts (a save, an export, reading weights).
        place: The step or round it stands at, for messages.
        last: When it last got on, in seconds of ``time.monotonic``.
    """

    def __init__(self) -> None:
        # Set one by one, and the watchdog may look in between: hence a sign is given before
        # ``is_slow`` changes. The time of a slow phase must never be held against a quick one.
        self.phase, self.is_slow, self.place = "start", True, ""
        self.last = time.monotonic()

    def beat(self) -> None:
        """The rank got on: a step, a pack, a step of the engine. Costs next to nothing."""
        self.last = time.monotonic()

    @contextlib.contextmanager
    def within(self, phase: str, *, slow: bool = False) -> Iterator[None]:
        """A phase of the run; back to the outer one afterwards."""
        outer = self.phase, self.is_slow
        self.beat()
        self.phase, self.is_slow = phase, slow
        try:
            yield
        finally:
            self.beat()
            self.phase, self.is_slow = outer
