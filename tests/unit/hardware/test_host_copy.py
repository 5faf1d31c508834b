"""Copies for a checkpoint: of their own, in memory that one save leaves to the next."""

import torch

from megatron_irl.hardware import host_copy
from megatron_irl.hardware.host_copy import copy_to_host


def make():
    """Views, odd sizes, an empty one, several types; one is not contiguous and has a gradient."""
    whole = torch.randn(300, 70)
    return [whole, whole[3], whole.t(), torch.randn(5, 7).bfloat16(), torch.arange(9),
            torch.empty(0, 3), torch.randn(4, 6, requires_grad=True).t(), torch.tensor(2.5)]


def test_copies_are_equal_and_out_of_reach():
    tensors = make()
    expected = [tensor.detach().clone() for tensor in tensors]
    copies = copy_to_host(tensors)
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    for copy, tensor in zip(copies, expected, strict=True):
        assert copy.dtype == tensor.dtype and not copy.requires_grad and copy.is_contiguous()
        assert torch.equal(copy, tensor)
        assert copy.untyped_storage().nbytes() == copy.numel() * copy.element_size()


def test_memory_is_used_again_and_never_twice_at_a_time(monkeypatch):
    monkeypatch.setattr(host_copy, "_KEPT", host_copy._Kept())

    def place(copies):
        return copies[0].data_ptr()

    first = [torch.full((1 << 18,), 1.0)]
    held = copy_to_host(first)
    at = place(held)
    other = copy_to_host([torch.full((1 << 18,), 2.0)])
    assert place(other) != at and float(held[0].sum()) == 1 << 18
    view = held[0][5:]  # a view keeps it in use
    del held, other
    third = copy_to_host(first)
    assert place(third) != at
    del view, third
    again = copy_to_host([torch.full((1 << 18,), 3.0)])
    assert place(again) == at and float(again[0].sum()) == 3 * (1 << 18)
    del again
    larger = copy_to_host([torch.ones(1 << 20)])
    assert float(larger[0].sum()) == 1 << 20
