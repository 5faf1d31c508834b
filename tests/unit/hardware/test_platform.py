"""The questions that other rooms ask about the hardware, on pretended machines."""

import os

import pytest
import torch

from examples.smollm2_irft.compare import pick_ranks
from megatron_irl import hardware
from megatron_irl.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are so many GPUs; gives the list of those that were selected."""
    selected = []

    def pretend(count: int) -> list[int]:
        monkeypatch.setattr(hardware, "IS_CUDA", True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", selected.append)
        return selected

    return pretend


def test_a_rank_without_a_gpu_is_the_users_error(gpus):
    selected = gpus(2)
    hardware.select_device(1)
    assert selected == [1]
    with pytest.raises(UserError, match=r"LOCAL_RANK=2 conflicts with the 2 GPU.*data_parallel"):
        hardware.select_device(2)
    assert selected == [1]


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (2, 2), (8, 2)])
def test_the_comparison_asks_for_no_more_ranks_than_gpus(gpus, count, ranks):
    gpus(count)
    assert pick_ranks() == ranks


def test_cores_are_the_room_without_a_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "IS_CUDA", False)
    assert hardware.device_count() == os.cpu_count()
    hardware.select_device(10**6)
