"""A row's product is the same whoever shares the step: resumed runs sample with fewer requests."""

import pytest
import torch

from megatron_irl.generation.skinny import MAX_ROWS, _either


def usual(*, input, weight, bias, **rest):
    return torch.nn.functional.linear(input, weight, bias)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize(("inner", "outer"), [(32, 96), (64, 32), (576, 500)])
def test_one_row_alone_and_among_others(inner, outer, copies):
    product = _either(usual, copies=copies)
    rows_MBK, weight = torch.randn(MAX_ROWS, 1, inner), torch.randn(outer, inner)
    bias = torch.randn(outer)

    def of(rows):
        return product(rows, weight, bias, sequence_parallel=False)

    pairs = torch.cat([of(rows_MBK[[i, 0]])[:1] for i in range(8)])
    alone = torch.cat([of(rows_MBK[i : i + 1]) for i in range(8)])
    assert torch.equal(alone, pairs)
    assert alone.shape == (8, 1, outer) and of(rows_MBK[:1]).is_contiguous()
    assert of(rows_MBK[:2]).is_contiguous() == copies
    expected = rows_MBK[:8].double() @ weight.t().double() + bias.double()
    assert torch.allclose(alone.double(), expected, atol=1e-3)
