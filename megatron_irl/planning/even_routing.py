"""Megatron's mixtures of experts on fake tensors, every expert with as many tokens as any other.

How many tokens an expert gets is read on the host, and fake tensors have no values. Within
``even_routing`` the dispatcher counts as many for each; how many there are together, and so what
its copies and the experts keep, is the same however tokens are routed.
"""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from torch import Tensor

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.compat.replaced import replaced

from megatron.core.transformer.moe.token_dispatcher import (  # isort: skip
    MoEAlltoAllTokenDispatcher,
)


def even_routing() -> AbstractContextManager[None]:
    """Within it mixtures of experts run on fake tensors."""
    return replaced((MoEAlltoAllTokenDispatcher, "preprocess", _preprocess))


def _preprocess(self: Any, routing_map: Tensor) -> np.ndarray:
    """Stands for the dispatcher's own; numbers that are read on the host stand in numpy.

    Args:
        routing_map: bool [tokens of this rank, experts].

    Returns:
        int [experts of this rank], tokens of each, of all ranks that share the layer.
    """
    assert not self.drop_and_pad
    experts, here, ranks = self.num_experts, self.num_local_experts, self.tp_size * self.ep_size
    rows = routing_map.shape[0] * self.config.moe_router_topk
    each = np.full(experts, rows // experts)
    each[: rows % experts] += 1
    mine = np.tile(each[self.local_expert_indices], (ranks, 1))  # [sending rank, local expert]
    self.num_out_tokens = rows
    self.num_global_tokens_per_local_expert = mine
    if ranks > 1:
        self.input_splits = each.reshape(self.ep_size, here).sum(1)
        self.output_splits = mine[: self.ep_size].sum(1)
        self.output_splits_tp = mine.reshape(self.tp_size, -1).sum(1)
    pieces = np.arange(ranks * here)  # of rows, by rank and expert or by expert and rank
    self.sort_input_by_local_experts = pieces.reshape(ranks, here).T.ravel()
    self.restore_output_by_local_experts = pieces.reshape(here, ranks).T.ravel()
    return mine.sum(0)
