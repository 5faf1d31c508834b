"""Log-probabilities of given tokens from hidden rows, without the full logits ever existing.

Peers gather ``[tokens, vocabulary]`` fp32 logits, prompts included; here only response rows reach
the language-model head, in chunks, and the vocabulary stays split over the tensor-parallel ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_irl import hardware  # noqa: F401  (must precede megatron)

from megatron.core.tensor_parallel import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)


ROWS = "vocabulary_rows"  # the attribute that mark_vocabulary_end sets


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], chunk by chunk; backward recomputes all but one.

    The softmax of the last chunk is kept, so a batch that fits one chunk is never recomputed and
    the memory peak stays one chunk of ``[chunk_size, Vp]`` either way.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, weight_VpH: Tensor, targets_R: Tensor,
        vocab_start: int, chunk_size: int, group: Any, softcap: float | None,
    ) -> Tensor:
        logprobs_R = torch.empty(hidden_RH.shape[0], dtype=torch.float32, device=hidden_RH.device)
        probs = None
        # The gradient of a soft cap needs the logits; they are made anew with the softmax.
        keep = (hidden_RH.requires_grad or weight_VpH.requires_grad) and softcap is None
        for start in range(0, hidden_RH.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            probs = None  # frees the previous chunk before the next is made
            logprobs_R[rows], probs, _ = _chunk_forward(
                hidden_RH[rows], weight_VpH, targets_R[rows], vocab_start, group, softcap,
                keep_probs=keep,
            )
        ctx.save_for_backward(hidden_RH, weight_VpH, targets_R)
        ctx.last_probs, ctx.vocab_start, ctx.chunk_size, ctx.group, ctx.softcap = (
            probs, vocab_start, chunk_size, group, softcap,
        )
        return logprobs_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_R,) = grads
        hidden_RH, weight_VpH, targets_R = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_RH)
        grad_weight: Tensor | None = None
        num_rows = hidden_RH.shape[0]
        for start in reversed(range(0, num_rows, ctx.chunk_size)):
            rows = slice(start, min(start + ctx.chunk_size, num_rows))
            probs, ctx.last_probs = ctx.last_probs, None
            slope = None
            if probs is None:
                _, probs, slope = _chunk_forward(
                    hidden_RH[rows], weight_VpH, targets_R[rows], ctx.vocab_start, ctx.group,
                    ctx.softcap, keep_probs=True,
                )
            assert probs is not None
            # d logprob[target] / d logits = onehot(target) - softmax
            grad_logits = probs.mul_(-grad_R[rows, None])
            local, inside = _local_targets(targets_R[rows], ctx.vocab_start, weight_VpH.shape[0])
            index = torch.arange(local.shape[0], device=local.device)
            grad_logits[index, local] += torch.where(inside, grad_R[rows], 0.0)
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(weight_VpH.dtype)
            grad_hidden[rows] = grad_logits @ weight_VpH
            if ctx.needs_input_grad[1]:
                part = grad_logits.T @ hidden_RH[rows]
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
        if grad_weight is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight_VpH)
        return grad_hidden, grad_weight, None, None, None, None, None


def _local_targets(targets_R: Tensor, vocab_start: int, shard: int) -> tuple[Tensor, Tensor]:
    local = targets_R - vocab_start
    inside = (local >= 0) & (local < shard)
    return torch.where(inside, local, 0), inside


def _chunk_forward(
    hidden_RH: Tensor, weight_VpH: Tensor, targets_R: Tensor, vocab_start: int, group: Any,
    softcap: float | None, *, keep_probs: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One chunk: returns log-probs [R] and, if asked, the softmax shard [R, Vp] in fp32.

    With a soft cap and if asked also its derivative [R, Vp] by the logits under it.
    """
    # Cast before any reduction: a bf16 all-reduce of log-sum-exp terms loses whole nats.
    logits = (hidden_RH @ weight_VpH.T).float()
    slope = None
    if softcap is not None:
        logits = logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if keep_probs else None
        logits = logits.mul_(softcap)
    local, inside = _local_targets(targets_R, vocab_start, weight_VpH.shape[0])
    target_logit = torch.where(inside, logits.gather(1, local[:, None])[:, 0], 0.0)
    if group.size() == 1:
        log_z = torch.logsumexp(logits, dim=-1)
        probs = logits.sub_(log_z[:, None]).exp_() if keep_probs else None
        return target_logit - log_z, probs, slope
    peak = logits.amax(dim=-1)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    target_logit = target_logit - torch.where(inside, peak, 0.0)
    exps = logits.sub_(peak[:, None]).exp_()
    sums = torch.stack([exps.sum(dim=-1), target_logit])
    dist.all_reduce(sums, group=group)
    normaliser, target_logit = sums
    probs = exps.div_(normaliser[:, None]) if keep_probs else None
    return target_logit - normaliser.log(), probs, slope


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
    chunk_size: int,
    softcap: float | None = None,
) -> Tensor:
    """Log-probabilities in nats of ``targets_R`` given the hidden states at ``rows_R``.

    Args:
        hidden_SBH: [T, 1, H] hidden states after the final norm; [T / tp, 1, H] under sequence
            parallelism. Any float dtype.
        weight_VpH: [Vp, H], this rank's rows of the output embedding, padding included.
        rows_R: int64 [R], positions in T; targets_R: int64 [R], global vocabulary ids.
        chunk_size: Rows whose ``[chunk_size, Vp]`` logits exist at one time.
        softcap: c of c tanh(logit / c), applied before the softmax; None: no cap.

    Returns:
        float32 [R], equal on every tensor-parallel rank.

    Gradient: to ``hidden_SBH`` and ``weight_VpH``; the gradient of the hidden states is summed
    over the tensor-parallel group (response rows only, or by reduce-scatter under sequence
    parallelism).
    Collectives: over ``tp_group``; every tensor-parallel rank must call.
    """
    if sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(
            hidden_SBH, tensor_parallel_output_grad=True, group=tp_group
        )
    hidden_RH = hidden_SBH[:, 0].index_select(0, rows_R)
    if not sequence_parallel:
        hidden_RH = copy_to_tensor_model_parallel_region(hidden_RH, group=tp_group)
    vocab_start = weight_VpH.shape[0] * tp_group.rank()
    num_real = getattr(weight_VpH, ROWS, weight_VpH.shape[0])
    if num_real < weight_VpH.shape[0]:  # even a whole slice would copy its gradient
        weight_VpH = weight_VpH[:num_real]
    return _ChunkedLogprobs.apply(
        hidden_RH, weight_VpH, targets_R, vocab_start, chunk_size, tp_group, softcap
    )


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
