"""Token log-probabilities summed by sequence."""

import pytest
import torch

from megatron_irl.objectives import sequence_logprobs


def test_sums_by_segment_and_leaves_empty_segments_at_zero():
    """Rows -1, -2 | none | -3, -4, -5 give -3, 0, -12."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    segments = torch.tensor([0, 0, 2, 2, 2])
    out = sequence_logprobs(logprobs, segments, 4)
    assert out.tolist() == [-3.0, 0.0, -12.0, 0.0]
    assert out.dtype == torch.float32


def test_half_precision_is_widened_before_the_sum():
    """257 times -1 is -257; bfloat16 (8 bits) cannot count past 256."""
    logprobs = torch.full((257,), -1.0, dtype=torch.bfloat16)
    out = sequence_logprobs(logprobs, torch.zeros(257, dtype=torch.int64), 1)
    assert out.item() == -257.0 and out.dtype == torch.float32


def test_gradient_is_the_one_of_the_rows_own_sequence():
    logprobs = torch.zeros(4, requires_grad=True)
    out = sequence_logprobs(logprobs, torch.tensor([0, 1, 1, 1]), 2)
    (out * torch.tensor([10.0, 7.0])).sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [10.0, 7.0, 7.0, 7.0]


def test_gradcheck():
    torch.manual_seed(0)
    logprobs = torch.randn(6, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([0, 0, 1, 3, 3, 3])
    assert torch.autograd.gradcheck(lambda x: sequence_logprobs(x, segments, 4), logprobs)


def test_shape_mismatch_is_refused():
    with pytest.raises(ValueError, match=r"\(3,\) and segment_R \(2,\)"):
        sequence_logprobs(torch.zeros(3), torch.zeros(2, dtype=torch.int64), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_are_those_of_adding_row_after_row(dtype):
    """As ``index_add`` does on the CPU, which recorded trajectories were made with."""
    segments = torch.randint(0, 50, (3000,)).sort().values
    logprobs = torch.randn(3000, dtype=dtype) * 10
    expected = torch.zeros(52, dtype=dtype).index_add(0, segments, logprobs)
    assert torch.equal(sequence_logprobs(logprobs, segments, 52), expected)


def test_rows_of_a_sequence_that_stand_apart_are_refused():
    with pytest.raises(ValueError, match="decreases"):
        sequence_logprobs(torch.zeros(3), torch.tensor([0, 1, 0]), 2)
