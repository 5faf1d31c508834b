"""Whether cache and graphs stay while training, on a device whose memory is made up."""

from types import SimpleNamespace

import pytest
import torch

from megatron_irl import hardware
from megatron_irl.generation.residency import Residency


class Device:
    """100 bytes, of which others hold 5; ``peak`` is what tensors took since it was reset."""

    def __init__(self, monkeypatch):
        self.peak = 0
        for name, value in (
            ("IS_CUDA", True), ("total_memory", lambda: 100), ("foreign_memory", lambda: 5),
            ("peak_memory", lambda: self.peak), ("reset_peak_memory", self.reset),
            ("device", lambda: torch.device("cpu")),
        ):
            monkeypatch.setattr(hardware, name, value)
        self.votes = []
        monkeypatch.setattr(torch.distributed, "all_reduce", self.vote)
        self.others = 0  # what another rank brings: 1 where it has no room

    def reset(self):
        self.peak = 0

    def vote(self, tensor, op, group):
        self.votes.append((int(tensor), op, group))
        tensor.fill_(max(int(tensor), self.others))


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def make(keep="auto"):
    return Residency(keep, SimpleNamespace(groups=SimpleNamespace(mp="mp")))


def phases(kept, device, *, training, cache, weights=0, generating=90):
    """A phase of training and one of generation; whether cache and graphs stay after it."""
    device.peak = training
    kept.note_update()
    kept.begin_generation()
    kept.cache_bytes, kept.weight_bytes = cache, weights
    device.peak = generating
    return kept.end_generation()


def test_nothing_stays_before_training_is_measured(device):
    kept = make()
    kept.begin_generation()
    kept.cache_bytes, device.peak = 1, 20
    assert not kept.end_generation()
    assert kept.peak_train is None and kept.peak_generation == 20


@pytest.mark.parametrize(("training", "cache", "weights", "stays"), [
    (60, 30, 0, True),  # with 5 of others and 5 to spare exactly 100
    (61, 30, 0, False), (60, 20, 10, True), (60, 20, 11, False),
])
def test_what_fits_beside_training_stays(device, training, cache, weights, stays):
    kept = make()
    assert phases(kept, device, training=training, cache=cache, weights=weights) is stays
    assert kept.peak_train == training and kept.peak_generation == 90
    assert device.votes == [(int(not stays), torch.distributed.ReduceOp.MAX, "mp")]


def test_what_stays_is_not_counted_as_training(device):
    kept = make()
    assert phases(kept, device, training=60, cache=20, weights=10)
    assert phases(kept, device, training=90, cache=20, weights=10), "30 of the 90 are its own"
    assert not phases(kept, device, training=91, cache=20, weights=10)
    assert not phases(kept, device, training=40, cache=20, weights=10), "its largest need is known"
    assert phases(kept, device, training=40, cache=20, weights=9)


def test_one_rank_without_room_decides_for_its_replica(device):
    device.others = 1
    assert not phases(make(), device, training=10, cache=10)


@pytest.mark.parametrize(("keep", "stays"), [("true", True), ("false", False)])
def test_what_is_asked_for_is_not_measured(device, keep, stays):
    assert phases(make(keep), device, training=99, cache=99) is stays
    assert device.votes == []
