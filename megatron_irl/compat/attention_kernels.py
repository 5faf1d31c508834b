"""Megatron's dynamic engine given our attention kernels for fp32, and for all types without others.

Upstream patches, all in ``megatron.core.transformer.attention`` (0.19.2):

* ``flash_attn_varlen_func`` and ``flash_attn_with_kvcache`` are None without flash-attn, which has
  no CPU build, and refuse fp32 with it. To be removed when the dynamic engine has an SDPA fallback.
  (flash-attn 3 and 4 have other entries; ``generation.borrow`` turns an fp32 model from them.)
* ``is_fa_min_version`` guards dynamic batching by the version of flash-attn. Same condition.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_irl.hardware.paged_attention import flash_attn_varlen_func, flash_attn_with_kvcache

from megatron.core.transformer import attention  # isort: skip


def install() -> None:
    """Patch ``megatron.core.transformer.attention``. Idempotent."""
    ours = (flash_attn_varlen_func, flash_attn_with_kvcache)
    for kernel in ours:
        theirs = getattr(attention, kernel.__name__)
        if theirs is None:
            setattr(attention, kernel.__name__, kernel)
            attention.is_fa_min_version = lambda *_, **__: True
        elif theirs not in ours and not isinstance(theirs, _ByType):
            setattr(attention, kernel.__name__, _ByType(theirs, kernel))


class _ByType:
    """A kernel of flash-attn in the types that it takes, and ours in fp32."""

    def __init__(self, theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
        self._theirs, self._ours = theirs, ours

    def __call__(self, *args: Any, **options: Any) -> Any:
        q: Tensor = args[0] if args else options["q"]
        chosen = self._ours if q.dtype == torch.float32 else self._theirs
        return chosen(*args, **options)
