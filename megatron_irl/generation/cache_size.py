"""How much memory the paged KV cache takes, known from the model's configuration alone."""

import math
from typing import Any

from megatron_irl import hardware
from megatron_irl.errors import UserError

GIB = 1024**3
CUDA_BLOCK_TOKENS = 256  # what flash-attn's paged kernels ask for


def default_block_tokens(max_sequence_length: int) -> int:
    """One block per sequence on CPU, where memory is committed page by page, and 256 on CUDA."""
    return CUDA_BLOCK_TOKENS if hardware.IS_CUDA else max_sequence_length


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
