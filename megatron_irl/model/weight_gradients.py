"""Weight gradients added to the fp32 buffer within the product that makes them.

Otherwise a product writes them in bf16 and a pass of its own adds them: 12 bytes a weight and
microbatch. Transformer Engine's layers have the fused product; Megatron's own linear layer takes it
from Apex.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from megatron_irl.errors import UserError


def check_accumulation(spec: str, fused: bool) -> None:
    """Refuse ``gradient_accumulation_fusion`` where its kernel is missing.

    Raises:
        UserError: The local layers are used and Apex is not installed.
    """
    if fused and spec == "local" and not _has_apex_kernel():
        raise UserError(
            "gradient_accumulation_fusion=true conflicts with the local layer spec without Apex, "
            "whose kernel it needs (Transformer Engine's layers have their own). Remove "
            "model.gradient_accumulation_fusion."
        )


@contextmanager
def without_apex(config: Any) -> Iterator[None]:
    """Build a GPTModel whose head does not ask for Apex.

    Megatron takes its own linear layer for the head under every spec, and that refuses
    ``gradient_accumulation_fusion`` without Apex, although here the head's weight is read and its
    forward never called where there is a gradient.
    """
    wanted = config.gradient_accumulation_fusion
    # Megatron-core 0.19 decides at construction. Goes when the head can be asked for by itself.
    config.gradient_accumulation_fusion = wanted and _has_apex_kernel()
    try:
        yield
    finally:
        config.gradient_accumulation_fusion = wanted


def accumulate_in_layers(model: nn.Module) -> None:
    """Let every Transformer Engine layer add its weight gradients to ``main_grad`` itself.

    They read the flag at every call, so it may be set after they are built. A backward needs the
    buffers then, that is, the model in Megatron's DDP.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _has_apex_kernel() -> bool:
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
