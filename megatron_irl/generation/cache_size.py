"""How much memory the paged KV cache takes, known from the model's configuration alone."""

import math
from typing import Any

from megatron_irl import hardware
from megatron_irl.errors import UserError

GIB = 1024**3
CUDA_BLOCK_TOKENS = 256  # what flash-attn's paged kernels ask for
ALL_EXPERTS_TOKENS = 512  # beyond, a GPU multiplies for longer than it would wait


def default_block_tokens(max_sequence_length: int) -> int:
    """One block per sequence on CPU, where memory is committed page by page, and 256 on CUDA."""
    return CUDA_BLOCK_TOKENS if hardware.IS_CUDA else max_sequence_length


def step_tokens(config: Any) -> int:
    """How many prompt tokens to compute together: many, as far as memory for them is no matter.

    On CUDA the layers' widest intermediate tensors of a step are kept to about 2 GiB.
    """
    return cuda_step_tokens(config) if hardware.IS_CUDA else 4096


def cuda_step_tokens(config: Any) -> int:
    """``step_tokens`` on CUDA, whatever this machine is."""
    ffn = config.ffn_hidden_size // config.tensor_model_parallel_size
    elements = 3 * ffn + 4 * config.hidden_size
    if config.num_moe_experts:
        # A token's rows, as many as it has experts, are on the ranks with slices of those experts.
        ffn = config.ffn_hidden_size // config.expert_tensor_parallel_size
        rows = config.moe_router_topk * (3 * ffn + 2 * config.hidden_size)
        elements = rows // config.expert_model_parallel_size + 4 * config.hidden_size
    per_token = elements * config.params_dtype.itemsize
    return min(65536, max(4096, 2 * GIB // per_token // 4096 * 4096))


def tokens_to_all_experts(config: Any) -> int:
    """The largest step that sends each token to all experts (``every_expert``), on a GPU.

    What it has between products is kept to 2 GiB.
    """
    return min(ALL_EXPERTS_TOKENS, 2 * GIB // bytes_to_all_experts(config))


def bytes_to_all_experts(config: Any) -> int:
    """What a token of such a step takes between products on this rank."""
    widths = 3 * config.ffn_hidden_size // config.expert_tensor_parallel_size
    row = (widths + 2 * config.hidden_size) * config.params_dtype.itemsize
    return row * config.num_moe_experts // config.expert_model_parallel_size


def mixed_graph_tokens(config: Any, max_requests: int, max_tokens: int) -> list[int]:
    """Token counts of the steps with prompts in them that are worth a CUDA graph, ascending.

    Where the device computes a step for longer than the host takes to start its kernels one by
    one (about 80 ms), a graph gains nothing.
    """
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.ffn_hidden_size * (
        config.moe_router_topk if config.num_moe_experts else 1)
    here = config.num_layers * layer // (
        config.tensor_model_parallel_size * config.pipeline_model_parallel_size
    )
    worth = 80e-3 * 4e14 / (2 * here)  # at 400 TFLOP/s
    sizes = [n + max_requests for n in (512, 1024, 2048, 3072, 4096, 6144, 8192, 12288)]
    tp = config.tensor_model_parallel_size
    sizes = [-(-n // tp) * tp for n in sizes if n <= worth]
    return [n for n in sizes if n <= max_tokens]


def cache_gb(
    config: Any, *, max_sequence_length: int, max_requests: int, block_tokens: int,
    kv_cache_gb: float | None,
) -> float:
    """GiB of this rank's cache: room for all requests at full length, or what is asked for.

    Args:
        config: Megatron's TransformerConfig, with the layout.
        kv_cache_gb: What the user allows, or None.

    Raises:
        UserError: That does not hold one sequence.
    """
    per_sequence = math.ceil(max_sequence_length / block_tokens)
    heads = max(1, config.num_query_groups // config.tensor_model_parallel_size)
    layers = config.num_layers // config.pipeline_model_parallel_size
    block_bytes = (
        2 * layers * block_tokens * heads * config.kv_channels * config.params_dtype.itemsize
    )
    full = (max_requests * per_sequence + 1) * block_bytes  # one block is the engine's
    least = (per_sequence + 1) * block_bytes
    asked = full if kv_cache_gb is None else kv_cache_gb * GIB
    if asked < least:
        raise UserError(
            f"generation.kv_cache_gb={kv_cache_gb} conflicts with a sequence length of "
            f"{max_sequence_length} tokens; one sequence needs {least / GIB:.3g} GiB. "
            "Raise generation.kv_cache_gb, or lower generation.max_new_tokens."
        )
    # Uneven stages hold more layers; the engine takes the smallest count over the pipeline.
    return min(asked, full) / GIB * (1 + 1e-9)
