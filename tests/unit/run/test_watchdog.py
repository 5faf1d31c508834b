"""A silent rank is ended, unless it waits for one that gets on."""

import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_irl.parallel.beat_board import BeatBoard
from megatron_irl.parallel.heartbeat import Heartbeat
from megatron_irl.run import watchdog
from megatron_irl.run.watchdog import Watchdog


@pytest.fixture
def boards(monkeypatch):
    """The boards of two ranks over one store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    return [BeatBoard(SimpleNamespace(rank=rank, world_size=2)) for rank in (0, 1)]


def arrive(boards):
    """A store's client does not wait for its writes, but its questions come after them."""
    for board in boards:
        board.heard()


def test_what_all_ranks_told(boards):
    assert boards[0].heard() is None  # rank 1 has not spoken yet
    before = time.time()
    boards[0].tell(100.0)
    boards[1].tell(250.5)
    arrive(boards)
    first = boards[0].heard()
    assert first == boards[1].heard() and first.until == 250.5
    assert before <= first.oldest <= time.time()
    boards[1].tell(90.0)
    arrive(boards)
    assert boards[1].heard().until == 100.0
    assert boards[1].heard().oldest == first.oldest  # rank 0 spoke longest ago


def test_one_rank_has_nobody_to_hear_of():
    board = BeatBoard(SimpleNamespace(rank=0, world_size=1))
    board.tell(5.0)
    assert board.heard() is None


@pytest.mark.parametrize(("other", "is_slow", "ends"), [
    ("gets on", False, False), ("hangs", False, True),
    ("hangs", True, False), ("stopped", True, True),
])
def test_a_rank_that_waits_for_another(boards, tmp_path, monkeypatch, other, is_slow, ends):
    monkeypatch.setattr(watchdog, "_meet", lambda _: ([], "token"))
    topology = SimpleNamespace(rank=0, world_size=2, heart=Heartbeat())
    topology.heart.is_slow = is_slow
    watched = Watchdog(topology, seconds=1.0, slow_seconds=60.0, folder=tmp_path)
    given_up = []
    monkeypatch.setattr(watched, "_give_up", lambda *_: given_up.append(time.monotonic()))
    until = time.time() + (60.0 if other == "gets on" else 0.5)
    boards[1].tell(until)
    start = time.monotonic()
    watched.start()
    try:
        while not given_up and time.monotonic() - start < 3.5:
            time.sleep(0.05)
            if other != "stopped":
                boards[1].tell(until)
    finally:
        watched.stop()
    assert bool(given_up) == ends
    assert not ends or given_up[0] - start > 1.0
