"""Stand-ins that keep for the backward pass what Transformer Engine's kernels keep.

Transformer Engine's layers cannot be made without a GPU. The planner runs Megatron's layers in the
local spec instead, with these in the places where the kernels differ in what they save: one input
of a norm, of an activation or of attention instead of every intermediate result. They compute
nothing that means anything, and run on fake tensors only.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.compat.replaced import replaced
from megatron_irl.model.local_layers import ZeroCenteredRMSNorm
from megatron_irl.model.packed_attention import PackedAttention

from megatron.core.models.common.embeddings import rope_utils  # isort: skip
from megatron.core.transformer import attention  # isort: skip
from megatron.core.transformer.mlp import MLP  # isort: skip
from megatron.core.transformer.moe import token_dispatcher  # isort: skip
from megatron.core.transformer.moe.experts import SequentialMLP  # isort: skip


class _Norm(torch.autograd.Function):
    """Keeps its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Activation(torch.autograd.Function):
    """Keeps its input, [.., 2F] or [.., F]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(*x.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return torch.empty_like(ctx.saved_tensors[0]), None


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, what it gives, and a number a head and row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        norms = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, norms)
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class _Copy(torch.autograd.Function):
    """Keeps nothing: a rotation by angles that are kept anyhow, rows in another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(grads[0])


class _Products(torch.autograd.Function):
    """A product of every expert at once, rows [n, in] → [n, out]; keeps its input.

    Gradients of weights are added to Megatron's buffer as they are computed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.shape = rows.shape
        if weight.requires_grad:  # frozen experts have no use for it
            ctx.save_for_backward(rows)
        return rows.new_empty(rows.shape[0], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].new_empty(ctx.shape), None


def like_transformer_engine() -> AbstractContextManager[None]:
    """Within it layers of the local spec keep what Transformer Engine's would."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight)

    def attend(self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(query, key, value)

    def rotate(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Copy.apply(x)

    def sort(rows: Tensor, *_: Any, probs: Tensor | None = None, **__: Any) -> Any:
        # Megatron's own of 128 experts is a thousand operations, which take their time.
        return _Copy.apply(rows), None if probs is None else _Copy.apply(probs)

    built = SequentialMLP.__init__

    def build(self: Any, num_local_experts: int, *args: Any, **kwargs: Any) -> None:
        del num_local_experts  # one stands for all of them: their weights are not counted here
        built(self, 1, *args, **kwargs)

    def experts(
        self: Any, rows: Tensor, tokens_per_expert: Any, probs: Tensor
    ) -> tuple[Tensor, None]:
        del tokens_per_expert
        first, second = self.local_experts[0].linear_fc1, self.local_experts[0].linear_fc2
        inner = _Activation.apply(_Products.apply(rows, first.weight), second.weight.shape[1])
        # What the router gives is float32, and so is the product before it is cast.
        inner = (inner * probs.unsqueeze(-1)).to(inner.dtype)
        return _Products.apply(inner, second.weight), None

    def mlp(self: Any, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        inner, bias = self.linear_fc1(hidden)
        inner = inner if bias is None else inner + bias
        width = self.linear_fc2.weight.shape[1]
        return self.linear_fc2(_Activation.apply(inner, width))

    places: list[tuple[Any, str, Any]] = [
        (nn.RMSNorm, "forward", norm), (nn.LayerNorm, "forward", norm),
        (ZeroCenteredRMSNorm, "forward", norm), (PackedAttention, "forward", attend),
        (rope_utils, "apply_rotary_pos_emb", rotate), (attention, "apply_rotary_pos_emb", rotate),
        (MLP, "forward", mlp), (SequentialMLP, "__init__", build),
        (SequentialMLP, "forward", experts), (token_dispatcher, "sort_chunks_by_idxs", sort),
    ]
    return replaced(*places)
