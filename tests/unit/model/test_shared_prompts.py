"""Rows to attention's places and back, and the two gradients, against plain indexing."""

import pytest
import torch

from megatron_irl.data.packing import pack
from megatron_irl.model.shared_prompts import _FromPlaces, _indices, _ToPlaces


def places(most):
    """Prompts of 3, 2 and 1 tokens with two, one and ``most`` responses, and padding."""
    prompts, counts = [[1, 2, 3], [4, 5], [6]], [2, 1, most]
    sequences = [(p, [7] * (i + 1)) for p, n in zip(prompts, counts, strict=True)
                 for i in range(n)]
    shared = pack(sequences, None, sharing=counts, multiple_of=32).shared
    assert shared is not None and shared.at_most == most
    return shared


@pytest.mark.parametrize("most", [2, 3])
def test_gradients_are_those_of_indexing(most):
    shared = places(most)
    rows = torch.randn(len(shared.first_T), 1, 2, 3, dtype=torch.float64, requires_grad=True)
    out = torch.randn(len(shared.rows_A), 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _ToPlaces.apply(x, *_indices(shared)), rows)
    assert torch.autograd.gradcheck(lambda x: _FromPlaces.apply(x, *_indices(shared)), out)
    assert torch.equal(_ToPlaces.apply(rows, *_indices(shared)), rows[shared.rows_A])
    assert torch.equal(_FromPlaces.apply(out, *_indices(shared)), out[shared.first_T])


def test_there_and_back_is_nothing():
    shared = places(2)
    rows = torch.randn(len(shared.first_T), 5)
    there = _ToPlaces.apply(rows, *_indices(shared))
    assert torch.equal(_FromPlaces.apply(there, *_indices(shared)), rows)
