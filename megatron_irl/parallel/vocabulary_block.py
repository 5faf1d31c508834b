"""One block of response rows against the vocabulary: log-probabilities, then their gradient.

Two ways to the same numbers. ``EagerBlock`` keeps the softmax in fp32 and takes about ten passes
over it; on a CPU, where the products decide, that does not show. On a GPU it was a tenth of a
training step, so ``FusedBlock`` keeps the logits in the dtype the product gave and makes each
direction one pass, compiled by torch. (Transformer Engine's and Liger's fused cross entropies do
not fit: they take whole vocabularies of equal slices and a known mean loss, while here a slice ends
where the vocabulary does, and the gradient of each row is known only after the loss of its pair.)
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_irl import hardware


class Block(Protocol):
    """Logits of some rows over this rank's slice of the vocabulary.

    Attributes:
        logprobs_R: float32 [R], nats, equal on every tensor-parallel rank.
        mean_R: float32 [R], nats: the mean log-probability of all tokens of the vocabulary, equal
            on every rank; None unless asked for.
    """

    logprobs_R: Tensor
    mean_R: Tensor | None

    def gradient(self, grad_R: Tensor, grad_mean_R: Tensor | None = None) -> Tensor:
        """D sum(grad * logprobs + grad_mean * mean) / d logits, [R, Vp] in the weight's dtype.

        May be called once, and not at all if the block was made without ``keep``. No collective.
        """
        ...


Low = tuple[Tensor, Tensor] | None
"""(low_Rr, low_Vpr), whose product an adapter adds to the logits; None without one."""


def product(hidden_RH: Tensor, weight_VpH: Tensor, low: Low) -> Tensor:
    """Logits [R, Vp] in the dtype of the weight, an adapter's part included."""
    logits = hidden_RH @ weight_VpH.T
    return logits if low is None else logits.addmm_(low[0], low[1].T)


def local_targets(targets_R: Tensor, vocab_start: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Columns of the targets in a slice that starts at ``vocab_start``, and which are inside it."""
    local = targets_R - vocab_start
    inside = (local >= 0) & (local < num_columns)
    return torch.where(inside, local, 0), inside


def mean_over_vocabulary(sum_R: Tensor, logits: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """A slice's sums of logits [R] → their mean over the vocabulary, and 1 / its size, a scalar.

    The last slice may be shorter than the others, so sizes are added up too. Collective.
    """
    size = sum_R.new_full((1,), logits.shape[1])
    if group.size() > 1:
        sums = torch.cat([sum_R, size])
        dist.all_reduce(sums, group=group)
        sum_R, size = sums[:-1], sums[-1:]
    return sum_R / size, 1 / size


class EagerBlock:
    """The softmax of one block in fp32, op by op.

    Args:
        hidden_RH, weight_VpH: Rows, and this rank's slice of the output embedding.
        targets_R: int64, global ids. vocab_start: The id of the slice's first row.
        group: The tensor-parallel group; every rank of it must construct (all-reduces).
        softcap: c of c tanh(logit / c), applied before the softmax; None: no cap.
        keep: Whether ``gradient`` will be called.
        low: Of an adapter of the head.
        with_mean: Whether ``mean_R`` is wanted.
    """

    def __init__(
        self, hidden_RH: Tensor, weight_VpH: Tensor, targets_R: Tensor, vocab_start: int,
        group: Any, softcap: float | None = None, *, keep: bool, low: Low = None,
        with_mean: bool = False,
    ) -> None:
        self._dtype = weight_VpH.dtype
        self.mean_R: Tensor | None = None
        self._share: Tensor | float = 0.0  # of one token in the mean
        self._targets = local_targets(targets_R, vocab_start, weight_VpH.shape[0])
        self._probs: Tensor | None = None
        self._slope: Tensor | None = None  # of the soft cap
        local, inside = self._targets
        # Cast before any reduction: a bf16 all-reduce of log-sum-exp terms loses whole nats.
        logits = product(hidden_RH, weight_VpH, low).float()
        if softcap is not None:
            logits = logits.div_(softcap).tanh_()
            self._slope = 1 - logits.square() if keep else None
            logits = logits.mul_(softcap)
        target_logit = torch.where(inside, logits.gather(1, local[:, None])[:, 0], 0.0)
        mean_logit: Tensor | None = None
        if with_mean:
            mean_logit, self._share = mean_over_vocabulary(logits.sum(dim=-1), logits, group)
        if group.size() == 1:  # rounds otherwise than below: TP 1 and 2 agree, but not bit for bit
            log_z = torch.logsumexp(logits, dim=-1)
            if mean_logit is not None:
                self.mean_R = mean_logit - log_z
            if keep:
                self._probs = logits.sub_(log_z[:, None]).exp_()
            self.logprobs_R = target_logit - log_z
            return
        peak = logits.amax(dim=-1)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        # Relative to the peak on the one rank that holds the target, 0 on the others, so that its
        # sum over the group is exact; one all-reduce brings it and the normaliser.
        target_logit = target_logit - torch.where(inside, peak, 0.0)
        exps = logits.sub_(peak[:, None]).exp_()
        sums = torch.stack([exps.sum(dim=-1), target_logit])
        dist.all_reduce(sums, group=group)
        normaliser, target_logit = sums
        if keep:
            self._probs = exps.div_(normaliser[:, None])
        self.logprobs_R = target_logit - normaliser.log()
        if mean_logit is not None:
            self.mean_R = mean_logit - peak - normaliser.log()

    def gradient(self, grad_R: Tensor, grad_mean_R: Tensor | None = None) -> Tensor:
        """See ``Block``."""
        probs, self._probs = self._probs, None
        assert probs is not None
        local, inside = self._targets
        # d logprob[target] / d logits = onehot(target) - softmax, d mean / d logits = 1/V - softmax
        if grad_mean_R is None:
            grad_logits = probs.mul_(-grad_R[:, None])
        else:
            grad_logits = probs.mul_(-(grad_R + grad_mean_R)[:, None])
            grad_logits += (self._share * grad_mean_R)[:, None]
        index = torch.arange(local.shape[0], device=local.device)
        # A row whose target is another rank's adds 0 at column 0: no branch, and no wait for the
        # device, which selecting rows by a mask would be.
        grad_logits[index, local] += torch.where(inside, grad_R, 0.0)
        if self._slope is not None:
            grad_logits.mul_(self._slope)
        return grad_logits.to(self._dtype)

    @staticmethod
    def keeps(softcap: float | None) -> bool:
        """Whether a block is worth keeping: the slope of a soft cap is as large again."""
        return softcap is None


class FusedBlock:
    """The same from logits that stay in the dtype of the product; arguments as ``EagerBlock``.

    The products round the logits to that dtype either way, so nothing is lost. ``gradient``
    overwrites them.
    """

    def __init__(
        self, hidden_RH: Tensor, weight_VpH: Tensor, targets_R: Tensor, vocab_start: int,
        group: Any, softcap: float | None = None, *, keep: bool, low: Low = None,
        with_mean: bool = False,
    ) -> None:
        self.mean_R: Tensor | None = None
        self._share: Tensor | float = 0.0
        self._targets, self._softcap = (
            local_targets(targets_R, vocab_start, weight_VpH.shape[0]), softcap,
        )
        logits = product(hidden_RH, weight_VpH, low)
        peak, normaliser, target_logit = _statistics(logits, *self._targets, softcap)
        if group.size() > 1:  # two all-reduces in a row: the sums need the common peak
            top = peak.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            # Each rank's sum is of exp(logit - its own peak); on to the common one.
            sums = torch.stack([normaliser * (peak - top).exp(), target_logit])
            dist.all_reduce(sums, group=group)
            peak, (normaliser, target_logit) = top, sums
        self._log_z = peak + normaliser.log()
        self._logits = logits if keep else None
        self.logprobs_R = target_logit - self._log_z
        if with_mean:
            sum_R = _sum_of_logits(logits, softcap)
            mean_logit, self._share = mean_over_vocabulary(sum_R, logits, group)
            self.mean_R = mean_logit - self._log_z

    def gradient(self, grad_R: Tensor, grad_mean_R: Tensor | None = None) -> Tensor:
        """See ``Block``."""
        logits, self._logits = self._logits, None
        assert logits is not None
        if grad_mean_R is None:
            _to_gradient(logits, self._log_z, grad_R, *self._targets, self._softcap)
        else:
            _to_gradient(logits, self._log_z, grad_R, *self._targets, self._softcap,
                         grad_R + grad_mean_R, self._share * grad_mean_R)
        return logits

    @staticmethod
    def keeps(softcap: float | None) -> bool:
        """See ``EagerBlock``; here the logits are all there is."""
        del softcap
        return True


@hardware.compiled
def _statistics(
    logits: Tensor, local: Tensor, inside: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 [R] each: the largest logit, sum of exp(logit - largest), the target's or 0."""
    values = logits.float()
    if softcap is not None:
        values = (values / softcap).tanh() * softcap
    peak = values.amax(dim=-1)
    normaliser = (values - peak[:, None]).exp().sum(dim=-1)
    target = logits.gather(1, local[:, None])[:, 0].float()
    if softcap is not None:
        target = (target / softcap).tanh() * softcap
    return peak, normaliser, torch.where(inside, target, 0.0)


@hardware.compiled
def _sum_of_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Float32 [R]: the sum over this slice."""
    values = logits.float()
    if softcap is not None:
        values = (values / softcap).tanh() * softcap
    return values.sum(dim=-1)


@hardware.compiled
def _to_gradient(
    logits: Tensor, log_z: Tensor, grad: Tensor, local: Tensor, inside: Tensor,
    softcap: float | None, both: Tensor | None = None, share: Tensor | None = None,
) -> None:
    """Overwrite logits by (onehot(target) - softmax) * grad; rows without a target have no 1.

    With a soft cap times its slope, 1 - tanh(logit / c)^2. Where the mean has a gradient too,
    ``both`` is the sum of the two and ``share`` the part of the second that each token has.
    """
    values = logits.float()
    bend = (values / softcap).tanh() if softcap is not None else None
    if bend is not None and softcap is not None:
        values = bend * softcap
    probs = (values - log_z[:, None]).exp()
    columns = torch.arange(logits.shape[1], device=logits.device)
    hit = (columns[None] == local[:, None]) & inside[:, None]
    if both is None or share is None:
        gradient = (hit.float() - probs) * grad[:, None]
    else:
        gradient = hit.float() * grad[:, None] - probs * both[:, None] + share[:, None]
    logits.copy_(gradient if bend is None else gradient * (1 - bend * bend))
