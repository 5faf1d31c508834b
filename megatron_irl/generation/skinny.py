"""Matrix products of few rows, as decoding has them, in the order that is fast on CPU.

For a weight [N, K] and M <= 64 rows, MKL computes ``W @ x.T`` in about half the time of
``x @ W.T`` (fp32, AVX2, 32 rows: 85 against 45 GFLOP/s). The numbers are the same up to rounding.

A row's product of two rows or more does not depend on how many there are, that of one alone does:
it is another routine, which adds up in another order. So one row is computed as two. Otherwise a
sample would have other log-probabilities, in the last bits, if a killed run samples it again
without the requests that it shared its steps with. (So measured with AVX-512. With AVX2 more than
one routine serves more than one row: there the last bits of samples may depend on their company.)

A router's weight has few rows itself, as many as there are experts, and few tokens at a time are
several routines then. There a few more are added, and taken away again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_irl import hardware

from megatron.core.tensor_parallel.layers import (  # isort: skip
    ColumnParallelLinear,
    RowParallelLinear,
)

from megatron.core.transformer.moe.router import Router  # isort: skip

MAX_ROWS = 64
STEADY_ROWS = 16  # of a router; 8 were enough


@contextmanager
def skinny_products(model: nn.Module) -> Iterator[None]:
    """Within the block the model's linear layers use the faster order; a no-op on CUDA.

    For inference only: the products have no gradient.
    """
    layers: dict[str, Any] = {}
    routers: list[Any] = []
    if hardware.BACKEND == "gloo":
        kinds = (ColumnParallelLinear, RowParallelLinear)
        layers = {name: m for name, m in model.named_modules() if type(m) in kinds}
        routers = [m for m in model.modules() if isinstance(m, Router)]
    for name, layer in layers.items():
        # Between the two products of an MLP everything is elementwise, and the second one wants
        # its input transposed anyhow.
        layer._forward_impl = _either(layer._forward_impl, copies=not name.endswith("linear_fc1"))
    for router in routers:
        router.gating = _with_more_rows(router.gating)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer._forward_impl
        for router in routers:
            del router.gating


def _with_more_rows(usual: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def logits(tokens_T1H: Tensor) -> Tensor:
        rows = tokens_T1H.shape[0]
        if rows >= STEADY_ROWS:
            return usual(tokens_T1H)
        more = tokens_T1H.new_zeros(STEADY_ROWS - rows, *tokens_T1H.shape[1:])
        return usual(torch.cat([tokens_T1H, more]))[:rows]

    return logits


def _either(usual: Callable[..., Tensor], *, copies: bool) -> Callable[..., Tensor]:
    """Megatron's product, or ours where it pays and nothing is gathered.

    With ``copies`` the result is contiguous, which a pipeline stage needs to send it on as it is.
    """

    def product(
        input: Tensor, weight: Tensor, bias: Tensor | None, *, sequence_parallel: bool, **rest: Any
    ) -> Tensor:
        rows = input.numel() // input.shape[-1]
        # An expert may have no rows at all.
        if not 0 < rows <= MAX_ROWS or sequence_parallel or weight.dtype != torch.float32:
            return usual(
                input=input, weight=weight, bias=bias, sequence_parallel=sequence_parallel, **rest
            )
        rows_MK = input.reshape(rows, -1)
        out_NM = (weight @ (rows_MK if rows > 1 else rows_MK.repeat(2, 1)).t())[:, :rows]
        if bias is not None:
            out_NM += bias[:, None]
        # A column of two is strided, and what is elementwise takes another path for strides.
        out_MN = out_NM.t().contiguous() if copies or rows == 1 else out_NM.t()
        return out_MN.unflatten(0, input.shape[:-1])

    return product
