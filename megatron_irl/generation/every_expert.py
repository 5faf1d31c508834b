"""Steps of few tokens send each to all experts, so that the host need not know who gets which.

Megatron's dispatcher tells the host how many tokens each expert gets, in every layer: the device
waits for the host, and a step cannot be captured as a CUDA graph. Where a step is as small as
decoding has them, nearly every expert is chosen by some token and its weights are read anyhow; the
products of a token with an expert it did not choose cost less than the waiting, and are multiplied
by a weight of zero. The experts are Megatron's own modules, given as many rows for each.

On a CPU there is nothing to wait for, and the products would be what a step costs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.generation.cache_size import tokens_to_all_experts

from megatron.core.tensor_parallel.mappings import (  # isort: skip
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer  # isort: skip


@contextmanager
def every_expert(model: nn.Module) -> Iterator[None]:
    """Within the block the model's mixtures work so in small steps; for inference only."""
    mixtures: list[Any] = [m for m in model.modules() if isinstance(m, MoELayer)]
    for layer in mixtures:
        layer.forward = _either(layer)
    try:
        yield
    finally:
        for layer in mixtures:
            del layer.forward


def _either(layer: Any) -> Any:
    usual, limit = layer.forward, tokens_to_all_experts(layer.config)
    shares = layer.attn_tp_group.size() if layer.config.sequence_parallel else 1

    def forward(hidden_T1H: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        if hidden_T1H.shape[0] * hidden_T1H.shape[1] * shares > limit:
            return usual(hidden_T1H, *rest, **named)
        return _to_all(layer, hidden_T1H, group=layer.attn_tp_group if shares > 1 else None), None

    return forward


def _to_all(layer: Any, hidden_T1H: Tensor, *, group: Any) -> Tensor:
    """What the layer's ``forward`` gives. [T, 1, H] → the same; T of this rank under ``group``.

    Collectives: over ``group``, where the tokens are spread over tensor parallelism.
    """
    weights_TE, _ = layer.router(hidden_T1H)
    tokens_TH = hidden_T1H.flatten(0, 1)
    if group is not None:
        tokens_TH = gather_from_sequence_parallel_region(tokens_TH, group=group)
        weights_TE = gather_from_sequence_parallel_region(weights_TE, group=group)
    rows, first, count = len(tokens_TH), layer.local_expert_indices[0], layer.num_local_experts
    mine_ET = weights_TE[:, first : first + count].t()
    out, _ = layer.experts(
        tokens_TH.repeat(count, 1), torch.full((count,), rows), mine_ET.reshape(-1)
    )
    out_TH = out.view(count, rows, -1).sum(0)
    if group is not None:
        out_TH = reduce_scatter_to_sequence_parallel_region(out_TH, group=group)
    return out_TH.view_as(hidden_T1H)
