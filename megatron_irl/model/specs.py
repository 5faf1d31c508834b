"""Layer specs: Transformer Engine's on CUDA, Megatron's local modules elsewhere."""

import functools
import logging
import os
from typing import Any, Literal, get_args

import torch

from megatron_irl import hardware
from megatron_irl.errors import UserError
from megatron_irl.model.lean_layers import SwiGLU, residual_add
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


VARIABLE = "MEGATRON_IRL_SPEC"


def choose_spec(
    params_dtype: torch.dtype, fp8: str | None = None, *, asked: str | None = None
) -> SpecName:
    """The layer spec of a model: ``asked``, else ``MEGATRON_IRL_SPEC``, else what runs best here.

    That is Transformer Engine on CUDA where it is installed, and the local modules elsewhere and
    for fp32, whose products Transformer Engine rounds to TF32.

    Raises:
        UserError: An unknown name, or a spec that cannot run here or not in this precision.
    """
    origin = f"spec={asked}" if asked else f"{VARIABLE}={os.environ.get(VARIABLE)}"
    name: Any = asked or os.environ.get(VARIABLE)
    if not name:
        name = "local"
        if hardware.IS_CUDA and params_dtype != torch.float32:
            name = "local" if _why_no_transformer_engine(warn=not fp8) else "transformer_engine"
        origin = "running without Transformer Engine"
    if name not in (names := get_args(SpecName)):
        raise UserError(f"{origin} is not one of {', '.join(names)}. Set one of these.")
    if name == "transformer_engine" and not hardware.IS_CUDA:
        raise UserError(
            f"{origin} conflicts with running on CPU; Transformer Engine needs an NVIDIA GPU. "
            f"Unset {VARIABLE}, or set it to local."
        )
    if name == "transformer_engine" and (reason := _why_no_transformer_engine()):
        raise UserError(
            f"{origin} conflicts with this environment: {reason}. Install transformer-engine "
            f"(NVIDIA's PyTorch container has it), or set {VARIABLE}=local."
        )
    if name == "local" and fp8:
        raise UserError(
            f"precision=fp8 conflicts with {origin}; FP8 products are Transformer Engine's. "
            f"Install transformer-engine and unset {VARIABLE}, or set precision to bf16."
        )
    return name


@functools.cache
def _why_no_transformer_engine(*, warn: bool = False) -> str | None:
    """Why Transformer Engine cannot be imported; None if it can."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        if warn:
            logging.getLogger(__name__).warning(
                "Transformer Engine cannot be imported (%s); Megatron's local layers are used, "
                "which are slower.", error,
            )
        return str(error)
    return None


def block_spec(
    config: TransformerConfig, name: SpecName, *, vp_stage: int | None, pp_rank: int,
    parallel_residual: bool = False,
) -> Any:
    """The transformer block spec of one pipeline stage.

    Args:
        name: What ``choose_spec`` gave.
        parallel_residual: Attention and MLP of a layer both read the layer's input.
    """
    if name == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if config.use_te_activation_func:
            layer.submodules.mlp.keywords["submodules"].activation_func = SwiGLU
    else:
        layer = _local_layer_spec(config)
    if hardware.IS_CUDA:
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = residual_add
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
