"""One packed microbatch through a model chunk: what its heads say, out of one hook.

``GPTModel.forward(output_processor=...)`` hands over the hidden states of the last stage, so the
prompt rows never reach the language-model head, no logits are gathered, and the reward head reads
the same hidden states.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_irl.families.table import ADAPTER, REWARD_HEAD
from megatron_irl.model.build import unwrap
from megatron_irl.model.local_layers import PackedRotaryEmbedding
from megatron_irl.model.packed_attention import padded_layout
from megatron_irl.model.reward_head import RewardHead
from megatron_irl.model.scales import LOGIT_SOFTCAP
from megatron_irl.model.shared_prompts import SHARED
from megatron_irl.parallel.logprobs import likeliest_tokens, response_logprobs
from megatron_irl.types import HeadChoice, HeadOutputs, PackedBatch

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip


class HeadRequest(NamedTuple):
    """What the last stage is asked for: the batch, the heads, and its own part of them."""

    batch: PackedBatch
    heads: HeadChoice
    reward_head: RewardHead | None
    logit_softcap: float | None


class HeadProcessor:
    """The output processor: hidden states → log-probabilities, rewards, or both.

    Args:
        rows_at_once: Rows whose vocabulary shard of logits exists at one time.
    """

    def __init__(self, rows_at_once: int) -> None:
        self.rows_at_once = rows_at_once

    def __call__(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None,
        context: HeadRequest, config: Any, **_: Any,
    ) -> Tensor | HeadOutputs:
        """Returns float32 [R] log-probabilities in nats, float32 [S] rewards, or both.

        For ``choices`` float32 [R, 2]: log-probabilities, and 1 where the token is the likeliest;
        for ``smoothed`` the same shape: log-probabilities, and their mean over the vocabulary.
        """
        batch, heads, head, softcap = context
        parallel = {
            "tp_group": output_layer.tp_group, "sequence_parallel": config.sequence_parallel,
        }
        scored = {"softcap": softcap, **parallel}
        if heads in ("logprobs", "smoothed"):
            scored["with_mean"] = heads == "smoothed"
            return self._logprobs(hidden_states, output_layer, output_weight, batch, scored)
        if heads == "choices":
            return self._choices(
                hidden_states, output_layer, output_weight, batch, parallel, softcap)
        assert head is not None, "rewards of a model without a reward head"
        rewards_S = head(hidden_states, batch.final_S, **parallel)
        if heads == "rewards":
            return rewards_S
        return HeadOutputs(
            self._logprobs(hidden_states, output_layer, output_weight, batch, scored), rewards_S
        )

    def _choices(
        self, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None,
        batch: PackedBatch, parallel: dict[str, Any], softcap: float | None,
    ) -> Tensor:
        weight, options = self._head_of(output_layer, output_weight, parallel)
        logprobs_R = response_logprobs(
            hidden_states, weight, batch.rows_R, batch.targets_R, softcap=softcap, **options)
        tokens_R = likeliest_tokens(hidden_states, weight, batch.rows_R, **options)
        return torch.stack([logprobs_R, (tokens_R == batch.targets_R).float()], dim=-1)

    def _logprobs(
        self, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None,
        batch: PackedBatch, options: dict[str, Any],
    ) -> Tensor:
        weight, options = self._head_of(output_layer, output_weight, options)
        return response_logprobs(
            hidden_states, weight, batch.rows_R, batch.targets_R, **options)

    def _head_of(
        self, output_layer: Any, output_weight: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The output embedding, and the options with its adapter."""
        # The head is read without being called. With ddp.overlap_param_gather its hook is what
        # waits for its parameters to arrive from the other data-parallel ranks.
        for hook in output_layer._forward_pre_hooks.values():
            hook(output_layer, ())
        weight = output_layer.weight if output_weight is None else output_weight
        adapter = getattr(output_layer, ADAPTER, None)
        if adapter is not None and adapter.is_applied:
            options = options | {"adapter": adapter.head_factors}
        return weight, options | {"rows_at_once": self.rows_at_once}


def forward_packed(
    chunk: nn.Module, batch: PackedBatch, processor: HeadProcessor, heads: HeadChoice = "logprobs"
) -> Any:
    """Run one packed microbatch through a (wrapped) model chunk.

    Returns:
        On the last pipeline stage what ``heads`` asks for: float32 [R] response log-probabilities,
        float32 [S] rewards, or ``HeadOutputs``. The stage's hidden states elsewhere. Gradient
        flows to the chunk's parameters.
    """
    # Bounds of whole sequences, as attention sees them: in A places where prompts are shared.
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
    setattr(packed, SHARED, batch.shared)
    model = unwrap(chunk)
    rotary = model.rotary_pos_emb
    if isinstance(rotary, PackedRotaryEmbedding):
        # Left on the module, because GPTModel (0.19) has no argument that reaches it. ``tolist``
        # and the layout make the host wait on CUDA, where the local layers are the slow way anyhow.
        positions = batch.position_ids_T[0]
        shared = batch.shared
        rotary.positions = positions if shared is None else positions[shared.rows_A]
        packed.padded_layout = padded_layout(batch.cu_seqlens.tolist(), batch.tokens_T.device)
    return chunk(
        input_ids=batch.tokens_T,
        position_ids=batch.position_ids_T,
        attention_mask=None,
        packed_seq_params=packed,
        output_processor=processor,
        output_processor_context=HeadRequest(
            batch, heads, getattr(model, REWARD_HEAD, None), getattr(model, LOGIT_SOFTCAP, None)
        ),
    )
