"""The reward head: one number per response, read off the backbone's hidden state at its last token.

A bias-free linear map beside the language-model head on the last pipeline stage. Its parameter is
fp32 under every precision, has a checkpoint key and a learning rate of its own, and is in no HF
folder the policy comes from.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_irl import hardware
from megatron_irl.families.table import REWARD_HEAD
from megatron_irl.model.build import unwrap
from megatron_irl.parallel.logprobs import rows_at
from megatron_irl.parallel.topology import Topology

PARAMETER = f"{REWARD_HEAD}.weight"


class RewardHead(nn.Module):
    """r = w . hidden, replicated over tensor parallelism.

    The weight begins at zero: equal on every layout without a word about random states, and every
    reward is 0, so that the first logistic loss is ln 2 whatever the backbone.

    Args:
        hidden_size: H.
        trunk_scale: What the gradient into the backbone is multiplied by; 0 detaches the head.
        pipeline_size: A stage must send some gradient back to the one before, if only zeros.
    """

    def __init__(self, hidden_size: int, *, trunk_scale: float, pipeline_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.zeros(1, hidden_size, dtype=torch.float32, device=hardware.device())
        )
        self.trunk_scale = trunk_scale
        self.must_send_gradient = pipeline_size > 1

    def forward(
        self, hidden_SBH: Tensor, final_S: Tensor, *, tp_group: Any, sequence_parallel: bool
    ) -> Tensor:
        """Rewards of the responses of a packed microbatch.

        Args:
            hidden_SBH: [T, 1, H] after the final norm; [T / tp, 1, H] under sequence parallelism.
            final_S: int64 [S], position in T of each response's last token.

        Returns:
            float32 [S], equal on every tensor-parallel rank.

        Gradient: to the weight, whole and equal on every tensor-parallel rank (nothing is to be
        summed); to the hidden rows times ``trunk_scale``, once however many ranks there are.
        Collectives: under sequence parallelism an all-reduce of [S, H] over ``tp_group``.
        """
        # With a stage before, a detached head would leave that stage waiting for the gradient of
        # what it sent; it gets zeros (``_ScaleGradient`` by 0).
        if self.trunk_scale == 0 and not self.must_send_gradient:
            hidden_SBH = hidden_SBH.detach()
        hidden_SH = rows_at(
            hidden_SBH[:, 0], final_S, tp_group=tp_group, sequence_parallel=sequence_parallel
        )
        if self.trunk_scale != 1 and hidden_SH.requires_grad:
            hidden_SH = _ScaleGradient.apply(hidden_SH, self.trunk_scale)
        return F.linear(hidden_SH.float(), self.weight)[:, 0]


class _ScaleGradient(torch.autograd.Function):
    """The identity, exactly; its gradient times a constant."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


def attach_reward_head(
    chunks: Sequence[nn.Module], topology: Topology, *, trunk_scale: float = 1.0
) -> None:
    """Give the last chunk of the last stage a reward head; before it is wrapped.

    Collectives: none. Nothing happens on the other stages.
    """
    if not topology.is_last_stage:
        return
    last: Any = chunks[-1]
    setattr(last, REWARD_HEAD, RewardHead(
        last.config.hidden_size, trunk_scale=trunk_scale, pipeline_size=topology.pp_size
    ))


def reward_head(chunks: Sequence[Any]) -> RewardHead | None:
    """This rank's reward head; None without one and on every stage but the last."""
    return getattr(unwrap(chunks[-1]), REWARD_HEAD, None)
