"""Our sampling inside Megatron's own engine step: the steps of requests that wait for cache."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.generation.requests import RequestTable
from megatron_irl.generation.sampling import sample_rows

from megatron.core.inference.sampling import Sampling  # isort: skip  (after the hardware)


class TableSampler(Sampling):
    """The engine's sampling backend, which keeps what it samples in a ``RequestTable``."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.table = RequestTable(SamplingConfig(), [], [])
        self.stopped = np.zeros(0, dtype=bool)

    def sample_kernel(
        self, logits: Tensor, n: int, context: Any, *, no_top_k: bool, no_top_p: bool,
        gather_indices: Tensor | None = None, token_to_request_index: Tensor | None = None,
        output: Tensor | None = None, eager: bool = False, cache_key: Any = None,
    ) -> Tensor:
        """Sample for the step's ``n`` active requests; see the base class."""
        del no_top_k, no_top_p, token_to_request_index, eager, cache_key
        logits = logits[:n] if gather_indices is None else logits[gather_indices[:n]]
        active = slice(context.paused_request_count, context.total_request_count)
        requests = context.request_ids[active].tolist()
        uniform_B = torch.from_numpy(self.table.uniforms(requests, 1)[0]).to(self.device)
        token_B, logprob_B = sample_rows(
            logits[:, : self.vocab_size], uniform_B, self.table.sampling
        )
        # The host waits for the step here: Megatron's bookkeeping needs the tokens. All steps but
        # those with a full cache go through ``DecodeLoop``.
        tokens = token_B.cpu().numpy()
        logprobs = logprob_B.cpu().numpy()
        once_B = np.ones(len(requests), dtype=np.int64)
        self.table.record(requests, tokens[None], logprobs[None], once_B)
        self.stopped = self.table.is_stop(tokens) | self.table.has_ended(requests)
        return token_B if output is None else output.copy_(token_B)

    def log_probs_kernel(
        self, logits: Tensor, context: Any, *, token_to_request_index: Tensor | None = None
    ) -> Tensor:
        raise NotImplementedError("log-probabilities are recorded as tokens are sampled")
