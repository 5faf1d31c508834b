"""One inference forward through this rank's model chunks, interleaved pipelines included."""

from typing import Any

import torch
from torch import Tensor

from megatron_irl import hardware  # noqa: F401  (must precede megatron)

from megatron.core.inference.communication_utils import (  # isort: skip
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (  # isort: skip  # noqa: E501
    GPTInferenceWrapper,
)


class StageWrapper(GPTInferenceWrapper):
    """Upstream's wrapper, extended from one model chunk to several.

    With virtual pipeline stages a token passes every rank once per chunk: after the last rank's
    chunk v comes the first rank's chunk v + 1. The hidden states therefore go round the ring of
    the pipeline group as many times as there are chunks.
    """

    def __init__(self, models: list[Any], context: Any, *, fixed_buffers: bool = False) -> None:
        super().__init__(models[0], context)
        self._models = models
        self._fixed_buffers = fixed_buffers
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def _allocate_recv_buffer(self, batch_size: int, seq_len: int) -> Tensor:
        """What the stage before sends arrives here: [S, B, H].

        A captured stage reads its input where it was at the capture, hence one buffer per shape.
        """
        if not self._fixed_buffers:
            return super()._allocate_recv_buffer(batch_size, seq_len)
        key = (batch_size, seq_len)
        if key not in self._buffers:
            self._buffers[key] = super()._allocate_recv_buffer(batch_size, seq_len)
        return self._buffers[key]

    @torch.inference_mode()
    def run_one_forward_step(
        self, inference_input: dict[str, Any], recv_buffer_seq_len: int | None = None
    ) -> Tensor | None:
        """Logits [1, rows, V] on the last stage, None elsewhere. Collective over the pipeline."""
        if len(self._models) == 1:
            return super().run_one_forward_step(inference_input, recv_buffer_seq_len)
        batch, length = self._get_batch_size_and_seq_len(
            inference_input["tokens"], recv_buffer_seq_len
        )
        out: Any = None
        # Sends and receives pair up in this order alone: a rank receives a chunk's input, runs it
        # and sends, before it turns to its next chunk, whose input is then a round away.
        for model in self._models:
            received = None
            if not model.pre_process:
                received = self._allocate_recv_buffer(batch, length)
                recv_from_prev_pipeline_rank_(received, self.pp_group)
            model.set_input_tensor(received)
            self.model = model
            out = self._forward(inference_input)
            if not model.post_process:
                send_to_next_pipeline_rank(
                    out.to(self.pipeline_communication_dtype), self.pp_group
                )
        self.model = self._models[0]
        self.inference_context.increment_sequence_len_offset(length)
        return out.to(self.config.params_dtype) if self._models[-1].post_process else None
