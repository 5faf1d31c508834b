"""Parts of a layer that cost a step more in Python or in memory than in work, in a lean form.

On a GPU Megatron's own are compiled by torch: each call looks up guards and walks through the
compiler's runtime, up to half a millisecond to launch one kernel, several times a layer. A step of
a small model waits for that. The compiled backward of SwiGLU also runs at a quarter of the memory's
speed. On a CPU Megatron's SwiGLU keeps four tensors for the backward pass where one will do.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_irl import hardware  # noqa: F401  (must precede megatron)

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # isort: skip

Added = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def residual_add(training: bool, fused: bool) -> Added:
    """What a layer adds to its residual, as Megatron's ``bias_dropout_add`` factories are asked.

    Without bias and dropout (every family here, unless a recipe sets ``model.hidden_dropout``) it
    is one addition; otherwise Megatron's own function does it.
    """

    def add(
        output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
    ) -> Tensor:
        output, bias = output_with_bias
        if bias is not None or (training and prob > 0):
            return get_bias_dropout_add(training, fused)(output_with_bias, residual, prob)
        return residual + output  # in the residual's dtype where that is the wider one

    return add


class SwiGLU(nn.Module):
    """silu(gate) * up: on a GPU by Transformer Engine's kernels, without its layers of Python.

    On a CPU the numbers of torch's own operations, bit for bit, of which only the input is kept.
    Stands in Megatron's MLP where ``use_te_activation_func`` puts a module.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        del config

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """[..., 2F] (gate, then up) → [..., F]. Gradient to the input."""
        # An expert may have no rows at all, of which a kernel makes none or an error.
        plain = gate_and_up.device.type == "cpu" or gate_and_up.numel() == 0
        return (_PlainSwiGLU if plain else _SwiGLU).apply(gate_and_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        return _kernels().swiglu(gate_and_up, None).view(*gate_and_up.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        # The kernel reads memory in order; a gradient may come as a view (of a gathered sequence).
        return _kernels().dswiglu(grads[0].contiguous(), gate_and_up, None).view_as(gate_and_up)


class _PlainSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_and_up)
        of_gate, of_up = grad.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=of_gate)
        return grad


def has_swiglu() -> bool:
    """Whether its kernels are there: of Transformer Engine under these names (2.0 and newer), or a
    CPU's, which torch has.
    """
    if not hardware.IS_CUDA:
        return True
    try:
        return hasattr(_kernels(), "swiglu") and hasattr(_kernels(), "dswiglu")
    except ImportError:
        return False


def _kernels() -> Any:
    import transformer_engine_torch  # imports nothing once it is loaded

    return transformer_engine_torch
