"""Norm and rotary embedding of the spec used without Transformer Engine.

Megatron-Core's own local spec refuses sequence parallelism in its norm and rotates a pack one
sequence at a time. With ``packed_attention`` these modules fill exactly the gaps.
"""

from typing import Any

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
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class PackedRotaryEmbedding(RotaryEmbedding):
    """Rotary angles laid out per packed token, so that RoPE is one operation per layer.

    Upstream applies RoPE to a pack one sequence at a time, with the angles recomputed for each.
    When the angles are already one per token it applies them at once; ``positions_T`` (set per
    microbatch by ``model.forward``) provides them.
    """

    positions_T: Tensor | None = None

    def forward(  # pyright: ignore[reportIncompatibleVariableOverride]  (upstream caches it)
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> Tensor:
        """Angles [T, 1, 1, d] of a pack, or [max_seq_len, 1, 1, d] otherwise."""
        if packed_seq and self.positions_T is not None:
            return self.get_emb(max_seq_len).index_select(0, self.positions_T)
        return super().forward(max_seq_len, offset, packed_seq, cp_group)
