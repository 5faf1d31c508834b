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


def test_the_latest_of_all_ranks(boards):
    assert boards[0].latest() == pytest.approx(time.time(), abs=5)  # rank 1 has not spoken yet
    boards[0].tell(100.0)
    boards[1].tell(250.5)
    assert boards[0].latest() == boards[1].latest() == 250.5
    boards[1].tell(90.0)
    assert boards[1].latest() == 100.0


def test_one_rank_has_nobody_to_hear_of():
    board = BeatBoard(SimpleNamespace(rank=0, world_size=1))
    board.tell(5.0)
    assert board.latest() == 0.0


@pytest.mark.parametrize("other_gets_on", [True, False])
def test_a_rank_that_waits_for_another(boards, tmp_path, monkeypatch, other_gets_on):
    monkeypatch.setattr(watchdog, "_meet", lambda _: ([], "token"))
    topology = SimpleNamespace(rank=0, world_size=2, heart=Heartbeat())
    topology.heart.is_slow = False
    watched = Watchdog(topology, seconds=1.0, slow_seconds=1.0, folder=tmp_path)
    given_up = []
    monkeypatch.setattr(watched, "_give_up", lambda *_: given_up.append(time.monotonic()))
    boards[1].tell(time.time() + (60.0 if other_gets_on else 0.5))
    start = time.monotonic()
    watched.start()
    try:
        while not given_up and time.monotonic() - start < 3.5:
            time.sleep(0.05)
    finally:
        watched.stop()
    assert bool(given_up) != other_gets_on
    assert other_gets_on or given_up[0] - start > 1.0
