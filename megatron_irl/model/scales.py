"""Constants that some families multiply or cap by, set on a chunk that Megatron has built.

Megatron's configuration has no place for them. Nothing here is a parameter.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.families.architecture import Architecture
from megatron_irl.hardware.softcap import soft_cap

from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

LOGIT_SOFTCAP = "logit_softcap"  # the attribute that ``model.forward`` reads off the last chunk


def set_scales(chunk: Any, config: TransformerConfig, architecture: Architecture) -> None:
    """Set the scale of attention, of RoPE, of embeddings, and the cap of logits.

    The cap reaches training through the attribute, since the output head is not called there
    (``parallel.logprobs``), and generation through a hook on the head.
    """
    for layer in chunk.decoder.layers:
        # Upstream's dynamic batching looks for the scale here and not in the configuration.
        if config.softmax_scale is not None:
            layer.self_attention.softmax_scale = config.softmax_scale
        # What upstream derives from its own YaRN, and multiplies cosines and sines by, in
        # training and generation alike. It has no public way in for frequencies of one's own.
        layer.self_attention._yarn_concentration_factor = architecture.rope_scale
    if chunk.pre_process and architecture.embedding_scale is not None:
        # transformers rounds the factor to the weights' type first.
        factor = torch.tensor(architecture.embedding_scale).to(config.params_dtype).item()
        # After the embedding's scatter under sequence parallelism too: a factor is of each element.
        chunk.embedding.register_forward_hook(lambda _module, _inputs, out: out * factor)
    if chunk.post_process and (cap := architecture.logit_softcap) is not None:
        setattr(chunk, LOGIT_SOFTCAP, cap)
        chunk.output_layer.register_forward_hook(_capping(cap))


def _capping(cap: float) -> Any:
    def hook(_module: Any, _inputs: Any, out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = out
        return soft_cap(logits, cap), bias

    return hook
