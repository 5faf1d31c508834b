"""Requests to stop a run: by signal, or because its time is up.

A request only leaves a note on the rank that gets it. The ranks act on it together, at points where
all of them come by (``agreement``), so that none waits for another that has left.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from megatron_irl.errors import RunStopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
FINISH_PART, LEAVE_PART = 1, 2  # levels of a request


class StopRequest:
    """What this rank has been asked, and how urgently.

    Attributes:
        part_seconds: How long a part of generation that is begun may take to be finished.
        time_is_up: Asked at every look, on the rank that watches the clock; None elsewhere.
        reason: For messages.
    """

    def __init__(
        self, part_seconds: float = 60.0, time_is_up: Callable[[], bool] | None = None
    ) -> None:
        self.part_seconds, self.time_is_up = part_seconds, time_is_up
        self.reason = ""
        self._since: float | None = None
        self._requests = 0
        self._at_once = False

    def ask(self, reason: str) -> None:
        """Ask for a stop; a second request gives up a part of generation too."""
        self._requests += 1
        if self._since is None:
            self._since, self.reason = time.monotonic(), reason

    @property
    def level(self) -> int:
        """0: go on; ``FINISH_PART``: stop at the next good point; ``LEAVE_PART``: at the next."""
        if self._since is None and self.time_is_up is not None and self.time_is_up():
            self.ask("the time limit of the job is near")
        if self._since is None:
            return 0
        late = time.monotonic() - self._since > self.part_seconds
        return LEAVE_PART if late or self._requests > 1 else FINISH_PART

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the signals of this process for requests, until the block ends.

        A second SIGINT ends the process at once. After a stop the signals stay ignored: the
        launcher may send more of them while the interpreter ends.
        """
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        stopped = False
        try:
            yield self
        except RunStopped:
            stopped = True
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if stopped and _is_rank() else handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block nobody waits for this rank yet: a signal stops it where it is.

        Raises:
            RunStopped: A signal came, at any line of the block.
        """
        self._at_once = True
        try:
            if self._since is not None:
                raise RunStopped(self.reason)
            yield
        finally:
            self._at_once = False

    def _take(self, number: int, frame: object) -> None:
        # Runs between any two lines of the main thread, in the middle of a collective's Python or
        # of a file being written: so it takes no lock, prints nothing and only sets attributes.
        del frame
        if number == signal.SIGINT and self._requests:
            # The kernel's own way out, which also works where Python does not come to run.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
            return
        self.ask(f"{signal.Signals(number).name} was received")
        if self._at_once:  # no collective is under way: raising here leaves nobody waiting
            raise RunStopped(self.reason)


def _is_rank() -> bool:
    """Whether a launcher started this process, rather than a person or a test."""
    return "RANK" in os.environ
