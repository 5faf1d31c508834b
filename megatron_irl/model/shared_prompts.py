"""Self-attention over packs that hold a shared prompt once.

The layers of a model see each token of a pack once: projections, MLP and norms of a prompt are not
computed again for each of its responses. Attention alone sees whole sequences. Between the two,
queries, keys and values are copied to every place of their tokens, and what attention gives is read
at the first place of each: causality makes it the same at all of them. So rotary embeddings and
attention kernels run on sequences of the kind that they always have.

Shape letters: T tokens of the pack, A places of its sequences, D what a row holds.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.types import SharedPrompts

from megatron.core.transformer.attention import SelfAttention  # isort: skip

SHARED = "shared_prompts"  # the attribute of PackedSeqParams that ``model.forward`` sets


class SharedPromptAttention(SelfAttention):
    """Upstream's self-attention, with rows copied before it and taken back after it.

    Packs without shared prompts, and the engine, go through as they are.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shared: SharedPrompts | None = None
        # A hook, because upstream's forward (0.19) calls core attention in the middle; with its
        # keyword arguments, because recomputation calls it again when this module's own state is
        # that of a later microbatch.
        self.core_attention.register_forward_hook(_take_back, with_kwargs=True)

    def forward(self, *args: Any, packed_seq_params: Any = None, **options: Any) -> Any:
        """As upstream; ``packed_seq_params`` may have ``shared_prompts``."""
        self._shared = getattr(packed_seq_params, SHARED, None)
        return super().forward(*args, packed_seq_params=packed_seq_params, **options)

    def get_query_key_value_tensors(self, *args: Any, **options: Any) -> Any:
        """Rows [A, 1, heads, size] of query, key and value, for [T, 1, H] hidden states."""
        found: Any = super().get_query_key_value_tensors(*args, **options)
        if self._shared is None:
            return found
        indices = _indices(self._shared)
        # A gate, which some models have besides, meets what attention gives at its tokens.
        return *(_ToPlaces.apply(rows, *indices) for rows in found[:3]), *found[3:]


def _take_back(_: Any, __: Any, options: dict[str, Any], out: Tensor) -> Tensor:
    """[A, D] → [T, D] after core attention, where prompts are shared."""
    shared = getattr(options.get("packed_seq_params"), SHARED, None)
    return out if shared is None else _FromPlaces.apply(out, *_indices(shared))


def _indices(shared: SharedPrompts) -> tuple[Tensor, Tensor, Tensor, int]:
    return shared.rows_A, shared.first_T, shared.again_B, shared.at_most


class _ToPlaces(torch.autograd.Function):
    """[T, ...] → [A, ...]; the gradient of a token is the sum over its places."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows_A: Tensor, first_T: Tensor, again_B: Tensor, at_most: int
    ) -> Tensor:
        ctx.save_for_backward(rows_A, first_T, again_B)
        ctx.at_most = at_most
        return x.index_select(0, rows_A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_A, first_T, again_B = ctx.saved_tensors
        (grad_A,) = grads
        grad_T = grad_A.index_select(0, first_T)
        rows_B, more = rows_A.index_select(0, again_B), grad_A.index_select(0, again_B)
        if ctx.at_most > 2:
            return grad_T.index_add_(0, rows_B, more), None, None, None, None
        # No row comes twice: one order of additions, and none of them atomic on CUDA.
        return grad_T.index_copy_(0, rows_B, more.add_(grad_T.index_select(0, rows_B))), *[None] * 4


class _FromPlaces(torch.autograd.Function):
    """[A, ...] → [T, ...], of the first place of each token; the others get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows_A: Tensor, first_T: Tensor, again_B: Tensor, at_most: int
    ) -> Tensor:
        del rows_A, again_B, at_most
        ctx.save_for_backward(first_T)
        ctx.places = x.shape[0]
        return x.index_select(0, first_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (first_T,) = ctx.saved_tensors
        (grad_T,) = grads
        grad_A = grad_T.new_zeros(ctx.places, *grad_T.shape[1:])
        # ``index_copy``: no place comes twice.
        return grad_A.index_copy_(0, first_T, grad_T), None, None, None, None
