"""Seconds of a block: by the clock, and on CUDA between two events."""

import time

import torch

from megatron_irl import hardware
from megatron_irl.hardware.stopwatch import Stopwatch


def test_seconds_by_the_clock(monkeypatch):
    monkeypatch.setattr(hardware, "IS_CUDA", False)
    watch = Stopwatch()
    for seconds in (0.03, 0.01):  # it may be used again
        start = time.perf_counter()
        with watch:
            time.sleep(seconds)
        assert seconds <= watch.seconds <= time.perf_counter() - start


def test_seconds_between_events(monkeypatch):
    """In order: the queue is empty, an event, the work, an event, the queue is empty again."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append(self)

        def elapsed_time(self, end):
            assert said == ["empty", self, "work", end, "empty"]
            return 1500.0

    monkeypatch.setattr(hardware, "IS_CUDA", True)
    monkeypatch.setattr(hardware, "synchronize", lambda: said.append("empty"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with Stopwatch() as watch:
        said.append("work")
    assert watch.seconds == 1.5
