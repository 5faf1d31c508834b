"""Records that pass between the rooms of the house; plain data, no behaviour worth testing.

Shape suffixes used throughout the package:

    T  tokens of one packed microbatch          S  sequences of one packed microbatch
    R  response rows of one packed microbatch   P  pairs of one packed microbatch
    H  hidden size                              V  vocabulary (Vp: this rank's shard)
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]
HeadChoice = Literal["logprobs", "rewards", "both", "choices", "smoothed"]
"""Which heads of the last stage run; decides what an objective is given. ``choices``, of evaluation
only, are log-probabilities beside whether each token is the likeliest one; ``smoothed`` are
log-probabilities beside their mean over the vocabulary."""
Reduction = Literal["mean", "max"]


@dataclass(frozen=True)
class Demonstration:
    """One (prompt, good answer) record as token ids.

    Attributes:
        ordinal: Position among the records kept, 0-based; the identity used by the pair bank.
        prompt_ids: int32 [prompt tokens], the rendered prompt including the assistant header.
        response_ids: int32 [response tokens], ending with EOS exactly once.
        prompt: The prompt as the user wrote it, for reports (messages are kept as a list).
        response: The response text, for reports.
        answer: Expected answer for exact-match evaluation, if the record has one.
        source: ``file:line`` of the record.
        loss_mask: bool [response tokens], True where a token is learnt; None: all of them are.
            Under ``data.turns: all`` a response goes from the first answer to the last and has the
            turns of others in between.
    """

    ordinal: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    prompt: str | list[dict[str, Any]]
    response: str
    answer: str | None
    source: str
    loss_mask: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """One generated response.

    Attributes:
        token_ids: int32 [n], the sampled ids; ends with EOS if and only if finish_reason is stop.
        logprobs: float32 [n], nats, log-probability of each id under the untempered policy.
        finish_reason: ``stop`` when EOS was emitted, ``length`` when the budget ended it.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason


@dataclass
class Pair:
    """A demonstration and the policy's own sample for the same prompt.

    Attributes:
        ordinal: ``Demonstration.ordinal``.
        prompt_ids, demo_ids, sample_ids: int32 token ids.
        sample_logprobs: float32 [len(sample_ids)], nats, as the engine reported them.
        finish_reason: Of the sample.
        ref_demo_logp, ref_sample_logp: Summed response log-probability in nats under the
            reference policy; None until the reference pass has run.
        round: Round in which the sample was drawn.
        reward_demo, reward_sample: Explicit rewards after the round's reward learning (rft); None
            until then, and for the other algorithms.
    """

    ordinal: int
    prompt_ids: np.ndarray
    demo_ids: np.ndarray
    sample_ids: np.ndarray
    sample_logprobs: np.ndarray
    finish_reason: FinishReason
    round: int = 0
    ref_demo_logp: float | None = None
    ref_sample_logp: float | None = None
    reward_demo: float | None = None
    reward_sample: float | None = None


@dataclass(frozen=True)
class Rollout:
    """A sample with its advantage: what a policy step trains on.

    Attributes:
        prompt_ids, sample_ids: int32 token ids.
        sample_logprobs: float32 [len(sample_ids)], nats, when it was sampled.
        ref_logp: Summed response log-probability in nats under the reference policy.
        advantage: Of the whole response over the other samples of its prompt.
    """

    prompt_ids: np.ndarray
    sample_ids: np.ndarray
    sample_logprobs: np.ndarray
    ref_logp: float
    advantage: float


@dataclass(frozen=True)
class SharedPrompts:
    """Where the tokens of a pack stand in the sequences that attention sees.

    In the pack a prompt that several responses share stands once; attention sees every sequence
    whole, laid end to end in A >= T places.

    Attributes:
        rows_A: int64 [A], the position in T of the token at each place.
        first_T: int64 [T], the first place of each token, and
        again_B: int64 [A - T], all other places.
        at_most: Places of a token; two in a training item, so that what is added up over them has
            one order.
    """

    rows_A: Tensor
    first_T: Tensor
    again_B: Tensor
    at_most: int

    def to(self, device: torch.device) -> "SharedPrompts":
        """Return the same on ``device``, as ``PackedBatch.to``."""
        rows_A, first_T, again_B = (
            _send(index, device) for index in (self.rows_A, self.first_T, self.again_B))
        return SharedPrompts(rows_A, first_T, again_B, self.at_most)


@dataclass(frozen=True)
class PackedBatch:
    """One microbatch of variable-length sequences laid end to end; no padding between them.

    Attributes:
        tokens_T: int64 [1, T].
        position_ids_T: int64 [1, T], of each token in its sequence, from 0 on.
        cu_seqlens: int32 [S + 1], or [S + 2] when a final masked padding segment aligns T; bounds
            of whole sequences, which end at T, or at A where prompts are ``shared``.
        max_seqlen: Longest segment, padding segment included.
        rows_R: int64 [R], positions in T whose next token is a response token. The last one of a
            shared prompt comes once for each of its responses.
        targets_R: int64 [R], that next token.
        segment_R: int64 [R], the sequence (0..S-1) each row belongs to; non-decreasing.
        num_sequences: S; the padding segment is not counted.
        lengths_S: int64 [S], response tokens of each sequence; those learnt, where some are not.
        ref_logps_S: float32 [S], cached reference log-probabilities in nats (zeros if unused).
        final_S: int64 [S], position in T of each response's last token (EOS where there is one).
        sampled_logprobs_R: float32 [R], nats, of each response token when it was sampled, and
        advantages_S: float32 [S]; both only where a policy step needs them.
        is_preference: The pairs are (chosen, rejected) ones of the preference stream.
        shared: Where sequences share prompts; None: each sequence has its tokens to itself.
    """

    tokens_T: Tensor
    position_ids_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows_R: Tensor
    targets_R: Tensor
    segment_R: Tensor
    num_sequences: int
    lengths_S: Tensor
    ref_logps_S: Tensor
    final_S: Tensor
    sampled_logprobs_R: Tensor | None = None
    advantages_S: Tensor | None = None
    is_preference: bool = False
    shared: SharedPrompts | None = None

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch on ``device``.

        From pageable memory a copy of more than a few pages makes the host wait until the device
        has done all that was queued before it; from pinned memory it never does.
        """
        moved: dict[str, Any] = {
            name: _send(value, device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        if self.shared is not None:
            moved["shared"] = self.shared.to(device)
        return PackedBatch(**moved)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device.type == "cpu" and device.type != "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HeadOutputs(NamedTuple):
    """What both heads of the last pipeline stage say about one microbatch.

    Attributes:
        logprobs_R: float32 [R] response log-probabilities in nats (the language-model head).
        rewards_S: float32 [S] rewards of the whole responses (the reward head).
    """

    logprobs_R: Tensor
    rewards_S: Tensor


class Metric(NamedTuple):
    """A number on its way to the log, with its denominator declared.

    Attributes:
        total: Scalar tensor: a sum (``mean``) or an extreme (``max``). Detached.
        weight: What ``total`` is divided by after both are summed over microbatches and ranks.
        reduction: ``mean`` is total/weight; ``max`` ignores the weight.
    """

    total: Tensor
    weight: Tensor | float
    reduction: Reduction = "mean"


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns.

    Attributes:
        total: Scalar float tensor, the *unnormalised* sum; carries the gradient.
        weight: Scalar integer tensor, the count (pairs or tokens) the global sum is divided by.
        metrics: Detached numbers by log key.
    """

    total: Tensor
    weight: Tensor
    metrics: dict[str, Metric] = field(default_factory=dict)
