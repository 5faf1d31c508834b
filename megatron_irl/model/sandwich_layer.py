"""Gemma's transformer layer: ``y = x + norm(attention(norm(x)))``, then ``y + norm(mlp(norm(y)))``.

Megatron-Core's layer adds what attention and MLP give as it is. The layers of a model may also
differ in their rotary frequencies; upstream hands all layers the same angles.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.model.attention_arguments import for_self_attention
from megatron_irl.model.local_layers import LocalNorm

from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip
from megatron.core.transformer.transformer_layer import TransformerLayer  # isort: skip
from megatron.core.utils import make_viewless_tensor  # isort: skip


class SandwichLayer(TransformerLayer):
    """A layer that normalises before and after attention and MLP.

    Args:
        local_rope_layers: By layer of the whole model, whether it takes the second half of the
            rotary angles; empty: there is one set of angles.

    The two norms after are our own parameters; all else, and the checkpoint names, is upstream's.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, local_rope_layers: Sequence[bool] = (),
        **options: Any,
    ) -> None:
        super().__init__(config, *args, **options)
        self.post_self_attn_layernorm = _norm(config)
        self.post_mlp_layernorm = _norm(config)
        self._takes_local_angles = None
        if local_rope_layers:  # layer_number counts from 1 over all stages
            self._takes_local_angles = local_rope_layers[self.layer_number - 1]

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        """[s, b, h] (or [s / tp, b, h] under sequence parallelism) → the same, and no context.

        ``options`` are those of ``TransformerLayer.forward`` that self-attention takes.
        """
        norm1: Any = self.input_layernorm
        norm2: Any = self.pre_mlp_layernorm
        mlp_layer: Any = self.mlp
        attention, bias = self.self_attention(
            norm1(hidden_states),
            **for_self_attention(
                options, rotary_pos_emb=self._own_angles(options.get("rotary_pos_emb"))
            ),
        )
        assert bias is None, "a bias would have to be added before the norm"
        attention = self.post_self_attn_layernorm(attention)
        hidden_states = self._add(self.self_attn_bda, attention, hidden_states)
        mlp, bias = mlp_layer(norm2(hidden_states))
        assert bias is None, "a bias would have to be added before the norm"
        added = self._add(self.mlp_bda, self.post_mlp_layernorm(mlp), hidden_states)
        # As upstream's layers end: a stage frees what it has sent, which a view would keep alive.
        return make_viewless_tensor(added, added.requires_grad, keep_graph=True), None

    def _own_angles(self, angles: Tensor | None) -> Tensor | None:
        if angles is None or self._takes_local_angles is None:
            return angles
        half = angles.shape[-1] // 2
        return angles[..., half:] if self._takes_local_angles else angles[..., :half]

    def _add(self, bda: Any, part: Tensor, residual: Tensor) -> Tensor:
        if self.config.fp32_residual_connection:
            residual = residual.float()
        with self.bias_dropout_add_exec_handler():
            add = bda(self.training, self.config.bias_dropout_fusion)
            return add((part, None), residual, self.hidden_dropout)


def _norm(config: TransformerConfig) -> Any:
    return LocalNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
