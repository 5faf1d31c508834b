"""Self-attention whose scores are soft-capped, on the paged cache as in training."""

from typing import Any

from torch import Tensor

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.hardware import paged_attention
from megatron_irl.model.shared_prompts import SharedPromptAttention

from megatron.core.transformer.utils import is_layer_window_attention  # isort: skip


class CappedSelfAttention(SharedPromptAttention):
    """Upstream's self-attention, with our paged kernels in the place of flash-attn's.

    Upstream passes no soft cap to flash-attn. In training the cap is the core attention's.
    """

    def __init__(self, *args: Any, softcap: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._softcap = softcap

    def flash_decode_and_prefill(
        self, q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqlens_k: Tensor, block_table: Tensor,
        is_decode_only: bool, softmax_offset: Tensor | None = None,
    ) -> Tensor:
        """Attend to the paged cache: q [T, 1, N, D] → [T, 1, N, D]; see the base class."""
        # Upstream's private hook (0.19) for the cache; the rest of the forward stays as it is. Goes
        # when its calls of flash-attn take a soft cap.
        assert softmax_offset is None, "attention sinks have no path here"
        config = self.config
        skip: Any = config.window_attn_skip_freq
        windowed = is_layer_window_attention(config.window_size, skip, self.layer_number)
        options: dict[str, Any] = {
            "softmax_scale": config.softmax_scale, "softcap": self._softcap,
            "block_table": block_table,
            "window_size": config.window_size if windowed else paged_attention.FULL_ATTENTION,
        }
        if is_decode_only:
            return paged_attention.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=seqlens_k, **options
            )
        out = paged_attention.flash_attn_varlen_func(
            q[:, 0], k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
        )
        return out[:, None]
