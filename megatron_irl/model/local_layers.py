"""Norm and rotary embedding of the spec used without Transformer Engine.

Megatron-Core's own local spec refuses sequence parallelism in its norm and rotates a pack one
sequence at a time. With ``packed_attention`` these modules fill exactly the gaps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_irl import hardware  # noqa: F401  (must precede megatron)

from megatron.core.models.common.embeddings import RotaryEmbedding  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip


class LocalNorm(nn.Module):
    """RMSNorm or LayerNorm whose weights are marked for sequence parallelism.

    The mark makes Megatron sum the weight gradient over the tensor-parallel group, since each
    rank sees only its slice of the sequence.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> nn.Module:
        kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        if config.layernorm_zero_centered_gamma:
            assert kind is nn.RMSNorm, "no family centres the weights of its LayerNorm"
            kind = ZeroCenteredRMSNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():  # read by finalize_model_grads, after the last backward
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class ZeroCenteredRMSNorm(nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight, in fp32, and rounds once at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] → [.., H] in the dtype of x."""
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(
            x.dtype
        )


class PackedRotaryEmbedding(RotaryEmbedding):
    """Rotary angles laid out per place of a pack, so that RoPE is one operation per layer.

    Upstream applies RoPE to a pack one sequence at a time, with the angles recomputed for each.
    When the angles are already one per token it applies them at once; ``positions`` (set per
    microbatch by ``model.forward``) provides them.

    A model whose layers rotate by two sets of frequencies gets both side by side, its own
    ``inv_freq`` first and ``local_inv_freq`` second; each layer takes its half.
    """

    positions: Tensor | None = None
    local_inv_freq: Tensor | None = None

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles [max_seq_len, 1, 1, d], or [.., 2 d] of two sets."""
        angles = super().get_emb(max_seq_len, offset)
        if self.local_inv_freq is None:
            return angles
        places = torch.arange(max_seq_len, device=angles.device, dtype=torch.float32) + offset
        local = torch.outer(places, self.local_inv_freq.to(angles.device))
        return torch.cat([angles, local.repeat(1, 2)[:, None, None]], dim=-1)

    def forward(  # pyright: ignore[reportIncompatibleVariableOverride]  (upstream caches it)
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> Tensor:
        """Angles [A, 1, 1, d] of a pack, or [max_seq_len, 1, 1, d] otherwise; see ``get_emb``."""
        # Past upstream's forward, which is cached by its arguments: the positions are none of them.
        if packed_seq and self.positions is not None:
            return self.get_emb(max_seq_len).index_select(0, self.positions)
        return super().forward(max_seq_len, offset, packed_seq, cp_group)
