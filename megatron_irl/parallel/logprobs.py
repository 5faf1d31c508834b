"""Log-probabilities of given tokens from hidden rows, without the full logits ever existing.

Peers gather ``[tokens, vocabulary]`` fp32 logits, prompts included; here only response rows reach
the language-model head, in blocks, and the vocabulary stays split over the tensor-parallel ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_irl import hardware  # must precede megatron
from megatron_irl.parallel.vocabulary_block import EagerBlock, FusedBlock, Low, product

from megatron.core.tensor_parallel import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)


ROWS = "vocabulary_rows"  # the attribute that mark_vocabulary_end sets


class _BlockedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], block by block; backward recomputes all but one.

    The second output is the mean over the vocabulary instead of the target, or None.

    What the last block needs for its gradient is kept (unless ``keep`` says that there will be
    none), so a batch that fits one block is never recomputed, and the memory peak stays one block
    either way.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, weight_VpH: Tensor, targets_R: Tensor, vocab_start: int,
        block_size: int, group: Any, softcap: float | None, make_block: Any, keep: bool,
        low_Rr: Tensor | None, low_Vpr: Tensor | None, with_mean: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # Tensor-parallel ranks have equal rows and so equally many blocks: the all-reduces inside
        # each pair up without a word. No rows, no block, no collective, on any of them.
        logprobs_R = torch.empty(hidden_RH.shape[0], dtype=torch.float32, device=hidden_RH.device)
        mean_R = torch.empty_like(logprobs_R) if with_mean else None
        block = None
        keep = keep and make_block.keeps(softcap)
        for start in range(0, hidden_RH.shape[0], block_size):
            rows = slice(start, start + block_size)
            block = None  # frees the previous block before the next is made
            block = make_block(
                hidden_RH[rows], weight_VpH, targets_R[rows], vocab_start, group, softcap,
                keep=keep, low=_rows_of(low_Rr, low_Vpr, rows), with_mean=with_mean,
            )
            logprobs_R[rows] = block.logprobs_R
            if mean_R is not None:
                mean_R[rows] = block.mean_R
        ctx.save_for_backward(hidden_RH, weight_VpH, targets_R, low_Rr, low_Vpr)
        ctx.last_block = block if keep else None
        ctx.vocab_start, ctx.block_size, ctx.group, ctx.softcap, ctx.make_block = (
            vocab_start, block_size, group, softcap, make_block,
        )
        return logprobs_R, mean_R

    @staticmethod
    def backward(
        ctx: Any, grad_R: Tensor, grad_mean_R: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # The mean has a gradient where it was asked for, of zeros if nobody used it, and else none.
        hidden_RH, weight_VpH, targets_R, low_Rr, low_Vpr = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_RH)
        grad_weight: Tensor | None = None
        grad_low = None if low_Rr is None else torch.empty_like(low_Rr)
        grad_factor = None if low_Vpr is None else torch.zeros_like(low_Vpr)
        num_rows = hidden_RH.shape[0]
        # From the last block on, which is still there. The order of the sum in ``grad_weight`` is
        # fixed by it: equal bits from run to run, other roundings under another ``block_size``.
        for start in reversed(range(0, num_rows, ctx.block_size)):
            rows = slice(start, min(start + ctx.block_size, num_rows))
            block, ctx.last_block = ctx.last_block, None
            if block is None:
                # Its all-reduces over the group come once more, on every rank in the same order.
                block = ctx.make_block(
                    hidden_RH[rows], weight_VpH, targets_R[rows], ctx.vocab_start, ctx.group,
                    ctx.softcap, keep=True, low=_rows_of(low_Rr, low_Vpr, rows),
                    with_mean=grad_mean_R is not None,
                )
            grad_logits = block.gradient(
                grad_R[rows], None if grad_mean_R is None else grad_mean_R[rows])
            del block
            # Through this rank's slice of the vocabulary alone. The sum over the group is the
            # backward of what ``response_logprobs`` brought the rows here with.
            grad_hidden[rows] = grad_logits @ weight_VpH
            if grad_low is not None and grad_factor is not None and low_Rr is not None:
                grad_low[rows] = grad_logits @ low_Vpr
                grad_factor.addmm_(grad_logits.T, low_Rr[rows])
            if ctx.needs_input_grad[1]:
                # The first block's product is the sum so far: [Vp, H] of zeros are not made for it.
                part = grad_logits.T @ hidden_RH[rows]
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
        if grad_weight is None and ctx.needs_input_grad[1]:  # no rows: DDP still waits for its hook
            grad_weight = torch.zeros_like(weight_VpH)
        nothing = (None,) * 7
        return grad_hidden, grad_weight, *nothing, grad_low, grad_factor, None


def _rows_of(low_Rr: Tensor | None, low_Vpr: Tensor | None, rows: slice) -> Low:
    return None if low_Rr is None or low_Vpr is None else (low_Rr[rows], low_Vpr)


def mark_vocabulary_end(weight_VpH: Tensor, vocab_size: int, tp_rank: int) -> None:
    """Say on an output embedding where the vocabulary ends and padding begins.

    ``response_logprobs`` leaves the rows after it out of the softmax; their gradient is zero.
    """
    rows = weight_VpH.shape[0]
    setattr(weight_VpH, ROWS, min(rows, vocab_size - tp_rank * rows))


def response_logprobs(
    hidden_SBH: Tensor,
    weight_VpH: Tensor,
    rows_R: Tensor,
    targets_R: Tensor,
    *,
    tp_group: Any,
    sequence_parallel: bool,
    rows_at_once: int,
    softcap: float | None = None,
    adapter: Callable[..., tuple[Tensor, Tensor]] | None = None,
    with_mean: bool = False,
) -> Tensor:
    """Log-probabilities in nats of ``targets_R`` given the hidden states at ``rows_R``.

    Args:
        hidden_SBH: [T, 1, H] hidden states after the final norm; [T / tp, 1, H] under sequence
            parallelism. Any float dtype.
        weight_VpH: [Vp, H], this rank's rows of the output embedding, padding included.
        rows_R: int64 [R], positions in T; targets_R: int64 [R], global vocabulary ids.
        rows_at_once: Rows whose fp32 logits [rows_at_once, Vp] exist at one time; see ``_blocks``.
        softcap: c of c tanh(logit / c), applied before the softmax; None: no cap.
        adapter: Of the output embedding: rows [R, H] → (low_Rr, low_Vpr), whose product is added
            to the logits. It sees to its own sums over the group.
        with_mean: Ask for the mean log-probability of all tokens of the vocabulary too.

    Returns:
        float32 [R], equal on every tensor-parallel rank; ``with_mean`` [R, 2], of the targets and
        of the mean.

    Gradient: to ``hidden_SBH`` and ``weight_VpH``; the gradient of the hidden states is summed
    over the tensor-parallel group (response rows only, or by reduce-scatter under sequence
    parallelism).
    Collectives: over ``tp_group``; every tensor-parallel rank must call.

    Example:
        logprobs_R = response_logprobs(
            hidden_SBH, output_layer.weight, batch.rows_R, batch.targets_R,
            tp_group=topology.tp_group, sequence_parallel=False, rows_at_once=2048)
    """
    vocab_start = weight_VpH.shape[0] * tp_group.rank()
    hidden_RH, weight_VpH, low_Rr, low_Vpr = _head_inputs(
        hidden_SBH, weight_VpH, rows_R, tp_group, sequence_parallel, adapter
    )
    make_block, block_size = _blocks(weight_VpH, rows_at_once)
    keep = torch.is_grad_enabled()  # inside the function it always says no
    logprobs_R, mean_R = _BlockedLogprobs.apply(
        hidden_RH, weight_VpH, targets_R, vocab_start, block_size, tp_group, softcap, make_block,
        keep, low_Rr, low_Vpr, with_mean,
    )
    return logprobs_R if mean_R is None else torch.stack([logprobs_R, mean_R], dim=-1)


def _blocks(weight_VpH: Tensor, rows_at_once: int) -> tuple[Any, int]:
    """What computes a block, and how many rows it has."""
    if not hardware.IS_CUDA:
        return EagerBlock, rows_at_once
    # An eager block's logits take 4 bytes each and as many again while they are rounded; fused ones
    # take what the dtype does, so the same memory holds more rows, and fewer are computed a second
    # time.
    return FusedBlock, rows_at_once * (8 // weight_VpH.element_size())


def _head_inputs(
    hidden_SBH: Tensor, weight_VpH: Tensor, rows_R: Tensor, tp_group: Any,
    sequence_parallel: bool, adapter: Callable[..., tuple[Tensor, Tensor]] | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(hidden_RH, this rank's rows without padding, low_Rr, low_Vpr); as ``response_logprobs``."""
    if sequence_parallel:
        # All-gather; backward a reduce-scatter and no plain split, because each rank's gradient is
        # only what came through its slice of the vocabulary (that is what the flag says).
        hidden_SBH = gather_from_sequence_parallel_region(
            hidden_SBH, tensor_parallel_output_grad=True, group=tp_group
        )
    hidden_RH = hidden_SBH[:, 0].index_select(0, rows_R)
    low_Rr, low_Vpr = (None, None) if adapter is None else adapter(
        hidden_RH, sequence_parallel=sequence_parallel)
    if not sequence_parallel:
        # Nothing forward; backward an all-reduce, here of the R response rows instead of all T.
        hidden_RH = copy_to_tensor_model_parallel_region(hidden_RH, group=tp_group)
    num_real = getattr(weight_VpH, ROWS, weight_VpH.shape[0])
    if num_real < weight_VpH.shape[0]:  # even a whole slice would copy its gradient
        weight_VpH = weight_VpH[:num_real]
        low_Vpr = None if low_Vpr is None else low_Vpr[:num_real]
    return hidden_RH, weight_VpH, low_Rr, low_Vpr


@torch.no_grad()
def likeliest_tokens(
    hidden_SBH: Tensor, weight_VpH: Tensor, rows_R: Tensor, *, tp_group: Any,
    sequence_parallel: bool, rows_at_once: int,
    adapter: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """The id with the largest logit in every row; of equal ones the smallest.

    A soft cap is monotonic and changes none.

    Args: as ``response_logprobs``.

    Returns:
        int64 [R], equal on every tensor-parallel rank. No gradient.

    Collectives: over ``tp_group``; every tensor-parallel rank must call.
    """
    vocab_start = weight_VpH.shape[0] * tp_group.rank()
    hidden_RH, weight_VpH, low_Rr, low_Vpr = _head_inputs(
        hidden_SBH, weight_VpH, rows_R, tp_group, sequence_parallel, adapter
    )
    tokens_R = torch.zeros(len(hidden_RH), dtype=torch.int64, device=hidden_RH.device)
    for start in range(0, len(hidden_RH), rows_at_once):
        rows = slice(start, start + rows_at_once)
        logits = product(hidden_RH[rows], weight_VpH, _rows_of(low_Rr, low_Vpr, rows)).float()
        peak, token = logits.max(dim=-1)
        token = token + vocab_start
        if tp_group.size() > 1:
            top = peak.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp_group)
            token = torch.where(peak == top, token, torch.iinfo(torch.int64).max)
            dist.all_reduce(token, op=dist.ReduceOp.MIN, group=tp_group)
        tokens_R[rows] = token
    return tokens_R


def rows_at(
    hidden_TH: Tensor, positions_S: Tensor, *, tp_group: Any, sequence_parallel: bool
) -> Tensor:
    """The hidden states at a few positions, whole on every tensor-parallel rank.

    Args:
        hidden_TH: [T, H], replicated over the group; [T / tp, H], this rank's share, under
            sequence parallelism.
        positions_S: int64 [S], positions in T.

    Returns:
        [S, H], equal on every rank, in the dtype of the hidden states.

    Gradient: to ``hidden_TH``, for a consumer whose gradient is the same on every rank. Replicated
    states get it as it is (a sum over the group would count it tp times); under sequence
    parallelism the rank that holds a row gets it, once.
    Collectives: under sequence parallelism an all-reduce over ``tp_group``.
    """
    if not sequence_parallel:
        return hidden_TH.index_select(0, positions_S)
    local_S = positions_S - tp_group.rank() * hidden_TH.shape[0]
    is_mine_S = (local_S >= 0) & (local_S < hidden_TH.shape[0])
    rows_SH = hidden_TH.index_select(0, torch.where(is_mine_S, local_S, 0))
    # Every row is held by one rank, so the sum has one term that is not zero and is exact.
    return reduce_from_tensor_model_parallel_region(
        torch.where(is_mine_S[:, None], rows_SH, 0.0), group=tp_group
    )
