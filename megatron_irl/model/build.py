"""HF architecture + recipe → Megatron-Core ``GPTModel`` chunks, wrapped for data parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_irl import hardware
from megatron_irl.config import (
    ParallelConfig,
    Precision,
    check_layout_against_model,
    check_open_section,
    padded_vocab_size,
)
from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture
from megatron_irl.model.kernels import check_environment
from megatron_irl.model.lean_layers import has_swiglu
from megatron_irl.model.local_layers import PackedRotaryEmbedding
from megatron_irl.model.mixtures import mixture_fields
from megatron_irl.model.precision import precision_fields
from megatron_irl.model.scales import set_scales
from megatron_irl.model.specs import SpecName, block_spec, choose_spec
from megatron_irl.model.weight_gradients import (
    accumulate_in_layers,
    check_accumulation,
    without_apex,
)
from megatron_irl.parallel.logprobs import mark_vocabulary_end
from megatron_irl.parallel.topology import Topology

from megatron.core.models.gpt.gpt_model import GPTModel  # isort: skip
from megatron.core.transformer.enums import AttnBackend  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu}


def build_config(
    architecture: Architecture,
    parallel: ParallelConfig,
    *,
    precision: Precision = "fp32",
    overrides: dict[str, Any] | None = None,
    spec: SpecName | None = None,
    check_hardware: bool = True,
) -> TransformerConfig:
    """Megatron's config from the HF architecture, the layout, and the recipe's ``model:`` keys.

    Args:
        spec: What ``build_chunks`` will be asked for, if anything.
        check_hardware: Without it the config may be one that this machine cannot run, to be
            checked only.

    Raises:
        UserError: Unknown ``model:`` keys, a layout that does not divide the model, a precision
            that cannot run here, or a combination that Megatron itself refuses.
    """
    overrides = dict(overrides or {})
    check_open_section("model", overrides, TransformerConfig)
    _check_shape_overrides(architecture, overrides)
    check_model_layout(architecture, parallel, precision)
    fields = dict(architecture.transformer)
    fields["activation_func"] = ACTIVATIONS[fields["activation_func"]]
    fields |= _layout_fields(parallel) | {
        # A loss contract of sums and counts: Megatron divides once by the global count, so
        # neither microbatching nor data parallelism can change the gradient.
        "calculate_per_token_loss": True,
        "moe_token_dispatcher_type": "alltoall",  # the one that allows variable lengths
        "use_cpu_initialization": not hardware.IS_CUDA,
        "perform_initialization": False,  # weights are always loaded
        # Megatron's fused GELU is the tanh approximation whatever activation_func says.
        "bias_activation_fusion": hardware.IS_CUDA and fields["activation_func"] is F.silu,
        "bias_dropout_fusion": hardware.IS_CUDA,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "attention_backend": AttnBackend.auto,
    }
    fields |= precision_fields(precision, overrides, check_hardware=check_hardware)
    fields |= overrides
    if isinstance(fields.get("activation_func"), str):
        fields["activation_func"] = ACTIVATIONS[fields["activation_func"]]
    if fields.get("use_te_activation_func") and not _is_swiglu(fields):
        raise UserError(
            "model.use_te_activation_func=true conflicts with this model's activation; there is "
            "one for gated SiLU only. Remove model.use_te_activation_func."
        )
    if check_hardware:
        grouped = _set_layer_fields(fields, overrides, architecture, spec) == "transformer_engine"
    else:
        fields["apply_rope_fusion"] = False  # Megatron looks for the kernel
        grouped = fields["params_dtype"] != torch.float32  # as a GPU's layers will be
        _set_swiglu(fields, overrides)
    fields = mixture_fields(architecture, overrides, grouped=grouped) | fields
    try:
        return TransformerConfig(**fields)
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"Megatron-Core refuses this model configuration: {error}") from error


def _set_layer_fields(
    fields: dict[str, Any], overrides: dict[str, Any], architecture: Architecture,
    asked: SpecName | None,
) -> SpecName:
    """Fill in place what depends on the layers that this machine builds the model of."""
    spec = choose_spec(
        fields["params_dtype"], fields.get("fp8"), asked=asked, local_only=architecture.local_only
    )
    can_fuse = spec == "transformer_engine" and architecture.rope_scale == 1
    _check_rope(spec, architecture, fields.setdefault("apply_rope_fusion", can_fuse))
    check_environment(fields["attention_backend"])
    if spec == "transformer_engine" or not hardware.IS_CUDA:
        _set_swiglu(fields, overrides)
    check_accumulation(
        spec, fields.setdefault("gradient_accumulation_fusion", spec == "transformer_engine")
    )
    return spec


def _layout_fields(parallel: ParallelConfig) -> dict[str, Any]:
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": (
            parallel.tensor_model_parallel_size // parallel.expert_model_parallel_size
        ),
        "sequence_parallel": parallel.sequence_parallel,
        # Packs differ in length, and stages tell each other the shape. The interleaved schedule
        # cannot: between two stages a shape to the next and one to the previous are mistaken for
        # each other. There the packs of a step are padded to one length, and the exchanges are
        # ordered ones.
        "variable_seq_lengths": not interleaved,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _set_swiglu(fields: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Make the MLP's activation ``lean_layers.SwiGLU`` if the recipe leaves it to us."""
    named = ("use_te_activation_func", "bias_activation_fusion", "activation_func_fp8_input_store",
             "activation_func_clamp_value", "glu_linear_offset", "cpu_offloading")
    if _is_swiglu(fields) and has_swiglu() and not any(name in overrides for name in named):
        fields |= {"use_te_activation_func": True, "bias_activation_fusion": False}


def _is_swiglu(fields: dict[str, Any]) -> bool:
    return fields["activation_func"] is F.silu and fields.get("gated_linear_unit", False)


def _check_rope(spec: SpecName, architecture: Architecture, fused: bool) -> None:
    """Refuse the fused RoPE where it would misread the angles or leave out their scale.

    The local spec's are one per packed token; the kernel takes angles by position in the
    sequence, and takes no scale.
    """
    if fused and spec == "local":
        raise UserError(
            "apply_rope_fusion=true conflicts with the local layer spec, whose rotary angles the "
            "fused kernel would misread. Remove model.apply_rope_fusion."
        )
    if fused and architecture.rope_scale != 1:
        raise UserError(
            f"apply_rope_fusion=true conflicts with config.json of model.hf, whose rope scales "
            f"cosines and sines by {architecture.rope_scale:.4g}; the fused kernel has no scale. "
            "Remove model.apply_rope_fusion."
        )


def _check_shape_overrides(architecture: Architecture, overrides: dict[str, Any]) -> None:
    """Refuse ``model:`` keys that contradict the weights; what does not shape them is free."""
    free = ("layernorm_epsilon", "attention_dropout", "hidden_dropout")
    for name, value in architecture.transformer.items():
        if name not in free and overrides.get(name, value) != value:
            raise UserError(
                f"model.{name}={overrides[name]} conflicts with config.json of model.hf, which "
                f"says {value}; the weights are made for that. Remove model.{name}."
            )


def check_model_layout(
    architecture: Architecture, parallel: ParallelConfig, precision: Precision
) -> None:
    """Raise UserError unless the layout divides the model and can run on this platform."""
    transformer = architecture.transformer
    check_layout_against_model(
        parallel,
        num_attention_heads=transformer["num_attention_heads"],
        num_query_groups=transformer["num_query_groups"],
        num_layers=transformer["num_layers"],
        vocab_size=architecture.vocab_size,
        hidden_size=transformer["hidden_size"],
        ffn_hidden_size=transformer["ffn_hidden_size"],
        num_moe_experts=transformer.get("num_moe_experts"),
        precision=precision,
    )
    if parallel.context_parallel_size > 1:
        raise UserError(
            f"parallel.context_parallel_size={parallel.context_parallel_size} is not supported: "
            "packed response rows are not split along the sequence. Set it to 1, and use "
            "parallel.sequence_parallel=true to save activation memory."
        )


def build_chunks(
    config: TransformerConfig,
    architecture: Architecture,
    topology: Topology,
    *,
    spec: SpecName | None = None,
) -> list[nn.Module]:
    """This rank's GPTModel chunks (one, or one per virtual pipeline stage), weights unset.

    Example:
        topology = initialize(parallel)
        chunks = build_chunks(build_config(arch, parallel), arch, topology)

    Collectives: under tied embeddings and pipeline parallelism Megatron all-reduces the embedding
    between the first and last stage; every rank must call.
    """
    name = choose_spec(
        config.params_dtype, config.fp8, asked=spec, local_only=architecture.local_only
    )
    _check_rope(name, architecture, config.apply_rope_fusion)
    if config.params_dtype == torch.float32:
        hardware.keep_float32()
    chunks = []
    rows = padded_vocab_size(architecture.vocab_size, topology.tp_size)
    virtual = config.virtual_pipeline_model_parallel_size
    for vp_stage in range(topology.vpp_size):
        stage = vp_stage if virtual else None
        with without_apex(config):
            chunk = GPTModel(
                config=config,
                transformer_layer_spec=block_spec(
                    config, name, architecture, vp_stage=stage, pp_rank=topology.pp_rank
                ),
                vocab_size=rows,
                max_sequence_length=architecture.max_sequence_length,
                pre_process=topology.is_first_stage and vp_stage == 0,
                post_process=topology.is_last_stage and vp_stage == topology.vpp_size - 1,
                share_embeddings_and_output_weights=architecture.tie_word_embeddings,
                position_embedding_type="rope",
                rotary_percent=architecture.rotary_percent,
                rotary_base=int(architecture.rotary_base),  # the exact frequencies are set below
                pg_collection=topology.groups,
                vp_stage=stage,
            )
        if config.gradient_accumulation_fusion:
            accumulate_in_layers(chunk)
        _set_rotary(chunk, config, architecture, topology, packed=name == "local")
        set_scales(chunk, config, architecture)
        if any(t.device != hardware.device() for t in (*chunk.parameters(), *chunk.buffers())):
            chunk = chunk.to(hardware.device())
        if chunk.post_process and rows > architecture.vocab_size:
            tied = chunk.share_embeddings_and_output_weights
            weight: Any = (
                chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
            )
            mark_vocabulary_end(weight, architecture.vocab_size, topology.tp_rank)
        chunks.append(chunk)
    return chunks


def _set_rotary(
    chunk: GPTModel, config: TransformerConfig, architecture: Architecture, topology: Topology,
    *, packed: bool,
) -> None:
    """Give the chunk the family's exact inverse frequencies (Megatron knows only some scalings)."""
    if packed:
        chunk.rotary_pos_emb = PackedRotaryEmbedding(
            kv_channels=config.kv_channels or 0,  # filled by the config itself
            rotary_percent=architecture.rotary_percent,
            rotary_interleaved=config.rotary_interleaved,
            rotary_base=int(architecture.rotary_base),
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=topology.groups.cp,
        )
        if architecture.local_inv_freq is not None:
            chunk.rotary_pos_emb.local_inv_freq = architecture.local_inv_freq.to(hardware.device())
    chunk.rotary_pos_emb.inv_freq = architecture.inv_freq.to(hardware.device(), torch.float32)


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside Megatron's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
