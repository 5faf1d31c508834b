"""Let Megatron-Core's CUDA graphs take a subclass of its dynamic inference context.

Reason: ``_check_supported_type`` compares the exact types of a captured module's arguments, and
ours is a subclass (``PagedContext``), so capture asserts. What is checked is harmless for a
subclass: replay compares the object itself.
Version: megatron-core 0.19.2, and 0.20's development branch.
Goes when: upstream accepts subclasses (``isinstance``), or the engine needs no context of ours.
"""

from typing import Any

from megatron_irl import hardware  # noqa: F401  (must precede megatron)

from megatron.core.inference.contexts.dynamic_context import (  # isort: skip
    DynamicInferenceContext,
)
from megatron.core.transformer import cuda_graphs  # isort: skip

_upstream = cuda_graphs._check_supported_type


def install() -> None:
    """Patch ``megatron.core.transformer.cuda_graphs``. Idempotent."""
    cuda_graphs._check_supported_type = _check_supported_type


def _check_supported_type(meta: Any) -> None:
    if not (isinstance(meta.type, type) and issubclass(meta.type, DynamicInferenceContext)):
        _upstream(meta)
