"""Layer specs: Transformer Engine's on CUDA, Megatron's local modules elsewhere."""

from typing import Any, Literal

from megatron_irl import platform
from megatron_irl.errors import UserError
from megatron_irl.model.local_layers import LocalNorm
from megatron_irl.model.packed_attention import PackedAttention
from megatron_irl.model.parallel_residual import ParallelResidualLayer

from megatron.core.models.gpt.gpt_layer_specs import (  # isort: skip
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp  # isort: skip
from megatron.core.transformer.spec_utils import ModuleSpec  # isort: skip
from megatron.core.transformer.transformer_block import (  # isort: skip
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip
from megatron.core.transformer.transformer_layer import TransformerLayer  # isort: skip

SpecName = Literal["transformer_engine", "local"]


def default_spec() -> SpecName:
    """Transformer Engine where there is a GPU, the local modules where there is none."""
    return "transformer_engine" if platform.IS_CUDA else "local"


def block_spec(
    config: TransformerConfig, name: SpecName, *, vp_stage: int | None, pp_rank: int,
    parallel_residual: bool = False,
) -> Any:
    """The transformer block spec of one pipeline stage.

    Args:
        parallel_residual: Attention and MLP of a layer both read the layer's input.

    Raises:
        UserError: Transformer Engine is asked for where it cannot run.
    """
    if name == "transformer_engine":
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"the Transformer Engine spec cannot be used: {error}. Install transformer-engine "
                "(NVIDIA's PyTorch container has it), or set MEGATRON_IRL_SPEC=local."
            ) from error
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        layer = _local_layer_spec(config)
    if parallel_residual:
        layer.module = ParallelResidualLayer
    if name == "transformer_engine":
        return layer
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=LocalNorm)


def _local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    submodules = get_gpt_layer_local_submodules(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    submodules.input_layernorm = LocalNorm
    submodules.pre_mlp_layernorm = LocalNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    qk_norm = LocalNorm if config.qk_layernorm else IdentityOp
    attention.q_layernorm = attention.k_layernorm = qk_norm
    return ModuleSpec(module=TransformerLayer, submodules=submodules)
