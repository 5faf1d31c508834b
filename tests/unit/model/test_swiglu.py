"""The lean SwiGLU gives torch's own numbers, and keeps nothing but its input."""

import pytest
import torch
import torch.nn.functional as F

from megatron_irl import hardware
from megatron_irl.model.lean_layers import SwiGLU

pytestmark = pytest.mark.skipif(hardware.IS_CUDA, reason="a GPU's is in tests/gpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 1, 6), (130, 1, 384)])
def test_bit_for_bit_torchs(dtype, shape):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, dtype=dtype)
    gate, up = x.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        got = SwiGLU(None)(x)
    assert torch.equal(got, expected)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
    (ours,), (torchs,) = (torch.autograd.grad(out, x, grad) for out in (got, expected))
    assert torch.equal(ours, torchs)


def test_gradient():
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGLU(None), (x,))


def test_gradient_that_is_a_view():
    """Of a gathered sequence, say: not in the order of memory."""
    x = torch.randn(6, 8, requires_grad=True)
    grad = torch.randn(4, 6).T
    (got,) = torch.autograd.grad(SwiGLU(None)(x), x, grad)
    gate, up = x.chunk(2, dim=-1)
    (expected,) = torch.autograd.grad(F.silu(gate) * up, x, grad.contiguous())
    assert torch.equal(got, expected)


def test_no_rows_need_no_kernel():
    """On a device whose kernels are not here: an expert that no token goes to."""
    assert SwiGLU(None)(torch.empty(0, 16, device="meta")).shape == (0, 8)
