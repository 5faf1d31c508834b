"""The signs of progress of a rank, as its watchdog may see them at any instant."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_irl.parallel import heartbeat
from megatron_irl.parallel.heartbeat import Heartbeat


def test_the_time_of_a_slow_phase_is_not_held_against_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nine hundred seconds of a save, and no instant at which a quick phase has lasted as long."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clock.now))
    longest = []

    class Watched(Heartbeat):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name in ("is_slow", "phase") and hasattr(self, "last") and not self.is_slow:
                longest.append(clock.now - self.last)

    heart = Watched()
    heart.is_slow = False
    with heart.within("checkpoint", slow=True):
        clock.now = 900.0
        with heart.within("scoring"):
            clock.now = 905.0
        clock.now = 2000.0
    heart.phase = "training"
    assert heart.phase == "training" and not heart.is_slow
    assert max(longest) <= 5.0
