"""Layer specs: Transformer Engine's on CUDA, Megatron's local modules elsewhere."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from megatron_irl import hardware
from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture
from megatron_irl.model.capped_attention import CappedSelfAttention
from megatron_irl.model.lean_layers import SwiGLU, residual_add
from megatron_irl.model.local_layers import LocalNorm
from megatron_irl.model.packed_attention import PackedAttention
from megatron_irl.model.parallel_residual import ParallelResidualLayer
from megatron_irl.model.sandwich_layer import SandwichLayer
from megatron_irl.model.shared_prompts import SharedPromptAttention

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
    params_dtype: torch.dtype, fp8: str | None = None, *, asked: str | None = None,
    local_only: str | None = None,
) -> SpecName:
    """The layer spec of a model: ``asked``, else ``MEGATRON_IRL_SPEC``, else what runs best here.

    That is Transformer Engine on CUDA where it is installed, and the local modules elsewhere and
    for fp32, whose products Transformer Engine rounds to TF32. ``local_only`` names what of the
    model Transformer Engine's layers lack; such a model is built of the local ones.

    Raises:
        UserError: An unknown name, or a spec that cannot run here or not in this precision.
    """
    origin = f"spec={asked}" if asked else f"{VARIABLE}={os.environ.get(VARIABLE)}"
    name: Any = asked or os.environ.get(VARIABLE)
    if not name:
        name = "local"
        if hardware.IS_CUDA and params_dtype != torch.float32 and not local_only:
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
    if name == "transformer_engine" and local_only:
        raise UserError(
            f"{origin} conflicts with a model with {local_only}, which Transformer Engine's layers "
            f"do not have. Unset {VARIABLE}, or set it to local."
        )
    if fp8 and local_only:
        raise UserError(
            f"precision=fp8 conflicts with a model with {local_only}; FP8 products are Transformer "
            "Engine's, whose layers do not have that. Set precision to bf16."
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
    config: TransformerConfig, name: SpecName, architecture: Architecture, *,
    vp_stage: int | None, pp_rank: int,
) -> Any:
    """The transformer block spec of one pipeline stage.

    Args:
        name: What ``choose_spec`` gave.
        architecture: What its layers are like beyond Megatron's own configuration.
    """
    if name == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    else:
        layer = _local_layer_spec(config)
    if config.use_te_activation_func:
        _mlp(layer.submodules, config).activation_func = SwiGLU
    if hardware.IS_CUDA:
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = residual_add
    if architecture.parallel_residual:
        layer.module = ParallelResidualLayer
    if architecture.sandwich_norms:
        layer.module = SandwichLayer
        layer.params = {"local_rope_layers": architecture.local_rope_layers}
    layer.submodules.self_attention.module = SharedPromptAttention
    _set_biases(layer.submodules, architecture)
    _set_softcap(layer.submodules, architecture.attention_softcap)
    if name == "transformer_engine":
        return layer
    # Upstream would give the block of a single layer spec its own final norm; see ``LocalNorm``.
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=LocalNorm)


def _mlp(layer: Any, config: TransformerConfig) -> Any:
    """What an MLP is made of, an expert's in a mixture; megatron-core 0.19 has partials there."""
    parts = layer.mlp.keywords["submodules"]
    return parts.experts.keywords["submodules"] if config.num_moe_experts else parts


def _set_biases(layer: Any, architecture: Architecture) -> None:
    """Give single projections their biases; Megatron's own switch is for all of them at once."""
    if architecture.proj_bias:
        attention = layer.self_attention.submodules
        attention.linear_proj = _with_bias(attention.linear_proj)
    if architecture.mlp_bias:
        old = layer.mlp.keywords["submodules"]
        new = dataclasses.replace(
            old, linear_fc1=_with_bias(old.linear_fc1), linear_fc2=_with_bias(old.linear_fc2)
        )
        layer.mlp = functools.partial(layer.mlp, submodules=new)


def _with_bias(build: Callable[..., Any]) -> Callable[..., Any]:
    """The same linear layer, with a bias whatever the caller asks for."""
    return lambda *sizes, **options: build(*sizes, **options | {"bias": True})


def _set_softcap(layer: Any, softcap: float | None) -> None:
    """Have attention cap its scores, in training and on the paged cache."""
    if softcap is not None:
        attention = layer.self_attention
        attention.module = CappedSelfAttention
        attention.params = attention.params | {"softcap": softcap}
        attention.submodules.core_attention = functools.partial(PackedAttention, softcap=softcap)


def _local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    submodules = get_gpt_layer_local_submodules(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    submodules.input_layernorm = LocalNorm
    submodules.pre_mlp_layernorm = LocalNorm
    if config.num_moe_experts:  # Transformer Engine does not fuse this norm, so nor do its names
        del submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    qk_norm = LocalNorm if config.qk_layernorm else IdentityOp
    attention.q_layernorm = attention.k_layernorm = qk_norm
    return ModuleSpec(module=TransformerLayer, submodules=submodules)
