"""GPT-NeoX's transformer layer: ``x + attention(norm1(x)) + mlp(norm2(x))``.

Megatron-Core's layer feeds the MLP what attention added to. Here the two only share their input,
so the layer works with either spec: Transformer Engine's fused norms are part of the linear layers
whose input is ``x`` all the same.
"""

from typing import Any

from torch import Tensor

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.model.attention_arguments import for_self_attention

from megatron.core.transformer.transformer_layer import TransformerLayer  # isort: skip
from megatron.core.utils import make_viewless_tensor  # isort: skip


class ParallelResidualLayer(TransformerLayer):
    """A layer whose attention and MLP read the same input.

    Norms, attention, MLP, dropout and checkpoint names are upstream's.
    """

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        """[s, b, h] (or [s / tp, b, h] under sequence parallelism) → the same, and no context.

        ``options`` are those of ``TransformerLayer.forward`` that self-attention takes.
        """
        norm1: Any = self.input_layernorm
        norm2: Any = self.pre_mlp_layernorm
        mlp_layer: Any = self.mlp
        residual = hidden_states.float() if self.config.fp32_residual_connection else hidden_states
        attention = self.self_attention(norm1(hidden_states), **for_self_attention(options))
        mlp = mlp_layer(norm2(hidden_states))
        fused = self.config.bias_dropout_fusion
        with self.bias_dropout_add_exec_handler():
            added = self.self_attn_bda(self.training, fused)(
                attention, residual, self.hidden_dropout
            )
            added = self.mlp_bda(self.training, fused)(mlp, added, self.hidden_dropout)
        # As upstream's layers end: a stage frees what it has sent, which a view would keep alive.
        return make_viewless_tensor(added, added.requires_grad, keep_graph=True), None
