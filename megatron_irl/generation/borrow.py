"""Lend the training module to the inference engine, and get it back as it was."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from megatron_irl import hardware
from megatron_irl.compat.replaced import replaced
from megatron_irl.generation.every_expert import every_expert
from megatron_irl.generation.skinny import skinny_products
from megatron_irl.parallel.scratch import drop_shared_buffers

from megatron.core.inference.utils import InferenceMode  # isort: skip
from megatron.core.models.common.embeddings import RotaryEmbedding  # isort: skip
from megatron.core.models.common.embeddings import YarnRotaryEmbedding  # isort: skip
from megatron.core.utils import unwrap_model  # isort: skip


@contextmanager
def borrow(chunks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Yield the GPTModels inside ``chunks``, in evaluation mode and ready for the engine.

    A model that trains in FP8 is lent in bf16, its parameters' type; the difference is part of the
    engine-trainer mismatch.

    On exit, also after an exception: train/eval flags, config fields, DDP's parameter-gathering
    hooks and process-wide inference flags are as before, and no tensor made in inference mode
    stays where training would find it (rotary caches, pipeline inputs, shared buffers).

    Collectives: with ``overlap_param_gather`` a parameter all-gather over data parallelism.
    """
    models = unwrap_model(list(chunks))
    with ExitStack() as stack:
        # First of all: it is collective over data parallelism, and what comes after (an engine that
        # is built, requests of different lengths) each replica does in its own time.
        for chunk in chunks:
            stack.enter_context(_without_gather_hooks(chunk))
        for model in models:
            stack.enter_context(_evaluation(model))
            stack.enter_context(skinny_products(model))
            if hardware.IS_CUDA:
                stack.enter_context(every_expert(model))
        for config in {id(model.config): model.config for model in models}.values():
            # Each rank of a context-parallel group holds all the weights and generates on its
            # own; interleaved stages are run one after the other by our own forward.
            stack.enter_context(replaced(
                (config, "context_parallel_size", 1),
                (config, "virtual_pipeline_model_parallel_size", None)))
            # In 8 bits the engine would replace the forward of Transformer Engine's layers for
            # good, read its cached 8-bit weights of an earlier update, and fail on later stages.
            stack.enter_context(replaced((config, "fp8", None), (config, "fp4", None)))
            if config.params_dtype == torch.float32:
                _use_paged_attention(models, stack)
        for model in models:
            # It would cut the angles to this rank's part of a sequence, which is whole here.
            if hasattr(model.rotary_pos_emb, "cp_group"):
                stack.enter_context(replaced((model.rotary_pos_emb, "cp_group", None)))
        stack.callback(_forget, models)
        # A flag of the process: left on, it would change how layers of training run.
        was_active = InferenceMode.is_active()
        stack.callback(InferenceMode.set_active if was_active else InferenceMode.unset_active)
        _forget(models)  # entries computed for training's context-parallel group
        InferenceMode.set_active()
        yield models


def complete_gather(chunks: Sequence[Any]) -> None:
    """Complete DDP's pending parameter all-gather, before somebody reads parameters themselves.

    Collectives: with ``overlap_param_gather`` over data parallelism.
    """
    for chunk in chunks:
        with _without_gather_hooks(chunk):
            pass


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _use_paged_attention(models: Sequence[nn.Module], stack: ExitStack) -> None:
    """Lead the attention of fp32 models to the entries that ``compat.attention_kernels`` serves.

    They are flash-attn 2's; the newer ones, preferred where installed, do not take fp32.
    """
    name = "flash_attention_version"
    having = [m for model in models for m in model.modules() if hasattr(m, name)]
    stack.enter_context(replaced(*((module, name, 2) for module in having)))


@contextmanager
def _without_gather_hooks(chunk: Any) -> Iterator[None]:
    """Complete DDP's pending parameter all-gather, and keep its hooks out of the forward."""
    if not getattr(chunk, "remove_forward_pre_hook_handles", None):
        yield
        return
    # Its hooks wait in a forward for the parameters that other replicas update. The engine calls
    # forwards as often as its requests want, which differs between replicas: waits would not pair.
    chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        chunk.enable_forward_pre_hook()


def _forget(models: Sequence[Any]) -> None:
    """Drop cached tensors that belong to one side of the fence."""
    for kind in (RotaryEmbedding, YarnRotaryEmbedding):
        kind.forward.cache_clear()  # upstream's lru_cache, one for all models of the process
    for model in models:
        model.set_input_tensor(None)
    drop_shared_buffers()
