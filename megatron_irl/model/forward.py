"""One packed microbatch through a model chunk: response log-probabilities out of one hook.

``GPTModel.forward(output_processor=...)`` hands over the hidden states of the last stage, so the
prompt rows never reach the language-model head and no logits are gathered.
"""

from typing import Any

from torch import Tensor, nn

from megatron_irl.model.build import unwrap
from megatron_irl.model.local_layers import PackedRotaryEmbedding, padded_layout
from megatron_irl.parallel.logprobs import response_logprobs
from megatron_irl.types import PackedBatch

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip


class LogprobProcessor:
    """The output processor: hidden states → log-probabilities of the response tokens.

    Args:
        chunk_size: Rows whose vocabulary shard of logits exists at one time.
    """

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None,
        context: PackedBatch, config: Any, **_: Any,
    ) -> Tensor:
        """Returns float32 [R] log-probabilities in nats; see ``response_logprobs``."""
        weight = output_layer.weight if output_weight is None else output_weight
        return response_logprobs(
            hidden_states,
            weight,
            context.rows_R,
            context.targets_R,
            tp_group=output_layer.tp_group,
            sequence_parallel=config.sequence_parallel,
            chunk_size=self.chunk_size,
        )


def forward_packed(chunk: nn.Module, batch: PackedBatch, processor: LogprobProcessor) -> Tensor:
    """Run one packed microbatch through a (wrapped) model chunk.

    Returns:
        float32 [R] response log-probabilities on the last pipeline stage; the stage's hidden
        states elsewhere. Gradient flows to the chunk's parameters.
    """
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
    rotary = unwrap(chunk).rotary_pos_emb
    if isinstance(rotary, PackedRotaryEmbedding):
        rotary.positions_T = batch.position_ids_T[0]
        packed.padded_layout = padded_layout(batch.cu_seqlens.tolist(), batch.tokens_T.device)
    return chunk(
        input_ids=batch.tokens_T,
        position_ids=batch.position_ids_T,
        attention_mask=None,
        packed_seq_params=packed,
        output_processor=processor,
        output_processor_context=batch,
    )
