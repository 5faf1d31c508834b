"""Whether a parallel layout fits the ranks, the batch and the model; plain arithmetic."""

import math

from megatron_irl.config.schema import ParallelConfig, Precision, Recipe
from megatron_irl.errors import UserError

# Transformer Engine's FP8 matrix products need every dimension in multiples of this.
FP8_MULTIPLE = 16


def check_layout(recipe: Recipe, world_size: int | None = None) -> int:
    """Check the layout against the ranks and the batch sizes.

    Args:
        recipe: Its ``parallel`` and ``train`` sections are read.
        world_size: Ranks started by torchrun or srun; None: the command line will start
            ``data_parallel_size`` replicas itself.

    Returns:
        The data-parallel size.

    Raises:
        UserError: The sizes do not divide, or an option needs another one.
    """
    parallel = recipe.parallel
    _check_options(parallel)
    if world_size is None:
        data_parallel_size = parallel.data_parallel_size
    else:
        replica = parallel.model_parallel_size
        if world_size % replica:
            raise UserError(
                f"world_size={world_size} is not a multiple of "
                f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size} x "
                f"parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} x "
                f"parallel.context_parallel_size={parallel.context_parallel_size}; a replica takes "
                f"{replica} ranks. Start {_neighbours(world_size, replica)} ranks, or change the "
                "layout.")
        data_parallel_size = world_size // replica
    _check_batches(recipe, data_parallel_size)
    return data_parallel_size


def check_layout_against_model(
    parallel: ParallelConfig,
    *,
    num_attention_heads: int,
    num_query_groups: int,
    num_layers: int,
    vocab_size: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_moe_experts: int | None = None,
    precision: Precision = "bf16",
) -> None:
    """Check the layout against the model's sizes, before any rank is started.

    Tensor parallelism splits the heads, the KV heads (query groups) and the feed-forward width,
    none of which is padded or replicated here, and the vocabulary, which is padded; pipeline stages
    are of equal length. With fp8 the matrices must also keep the alignment of FP8 products.

    Raises:
        UserError: A size does not divide; the message lists the parallel sizes that would work.
    """
    tensor = parallel.tensor_model_parallel_size
    _check_experts(parallel, num_moe_experts)
    slices = tensor // parallel.expert_model_parallel_size  # of an expert, or of the one MLP
    split = {"num_attention_heads": num_attention_heads, "num_query_groups": num_query_groups,
             "ffn_hidden_size": ffn_hidden_size * parallel.expert_model_parallel_size}
    rules = {"num_attention_heads": "attention heads are split over tensor-parallel ranks",
             "num_query_groups": "KV heads are split over tensor-parallel ranks, not replicated",
             "ffn_hidden_size": "the feed-forward width is split over tensor-parallel ranks"}
    for name, size in split.items():
        if size % tensor:
            raise UserError(
                f"parallel.tensor_model_parallel_size={tensor} does not divide {name}={size}; "
                f"{rules[name]}. Set parallel.tensor_model_parallel_size to "
                f"{_either(_divisors(math.gcd(*split.values())))}.")
    if padded_vocab_size(vocab_size, tensor) - vocab_size >= padded_vocab_size(
        vocab_size, tensor
    ) // tensor:
        raise UserError(
            f"parallel.tensor_model_parallel_size={tensor} conflicts with vocab_size={vocab_size}; "
            "the last rank would hold nothing but padding. Set "
            "parallel.tensor_model_parallel_size lower.")
    _check_stages(parallel, num_layers)
    if precision == "fp8":
        for name, size, ranks in (("hidden_size", hidden_size, 1),
                                  ("ffn_hidden_size", ffn_hidden_size, slices)):
            if size // ranks % FP8_MULTIPLE:
                raise UserError(
                    f"precision=fp8 conflicts with {name}={size} over {ranks} rank(s); FP8 "
                    f"products need multiples of {FP8_MULTIPLE} and each rank holds "
                    f"{size // ranks}. Set precision to bf16"
                    f"{'' if ranks == 1 else ', or parallel.tensor_model_parallel_size lower'}.")


def _check_experts(parallel: ParallelConfig, experts: int | None) -> None:
    tensor, groups = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    name = f"parallel.expert_model_parallel_size={groups}"
    if experts and tensor > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.tensor_model_parallel_size={tensor} without parallel.sequence_parallel "
            f"conflicts with a model of {experts} experts a layer; each rank routes its own part "
            "of the tokens. Set parallel.sequence_parallel to true.")
    if groups == 1:
        return
    if not experts:
        raise UserError(f"{name} conflicts with a model that has no experts. Remove it.")
    if experts % groups:
        raise UserError(
            f"{name} does not divide num_moe_experts={experts}; every rank holds as many experts. "
            "Set it to 1, where each holds slices of all, or choose another "
            "parallel.tensor_model_parallel_size.")


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding with every rank's share equally large; the last rows are padding.

    Padding rows are zero, are left out of the softmax, never sampled, and not exported.
    """
    return -(-vocab_size // tensor_parallel_size) * tensor_parallel_size


def _check_options(parallel: ParallelConfig) -> None:
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    if parallel.sequence_parallel and tensor == 1:
        raise UserError("parallel.sequence_parallel=true conflicts with "
                        "parallel.tensor_model_parallel_size=1; sequence parallelism splits over "
                        "the tensor-parallel ranks. Set parallel.sequence_parallel to false, or "
                        "parallel.tensor_model_parallel_size above 1.")
    experts = parallel.expert_model_parallel_size
    if experts not in (1, tensor):
        raise UserError(
            f"parallel.expert_model_parallel_size={experts} conflicts with "
            f"parallel.tensor_model_parallel_size={tensor}; the ranks that share a layer hold "
            "slices of every expert (1) or whole ones (as many as tensor-parallel ranks), so that "
            "replicas sample without waiting for each other. Set it to "
            f"{_either(sorted({1, tensor}))}.")
    if virtual is None:
        return
    path = "parallel.virtual_pipeline_model_parallel_size"
    if virtual < 2:
        raise UserError(f"{path}={virtual} is below 2; one chunk per stage is a plain pipeline. "
                        f"Remove {path}, or set it to 2 or more.")
    if pipeline == 1:
        raise UserError(f"{path}={virtual} conflicts with parallel.pipeline_model_parallel_size=1;"
                        f" chunks are interleaved between pipeline stages. Remove {path}, or set "
                        "parallel.pipeline_model_parallel_size above 1.")


def _check_batches(recipe: Recipe, data_parallel_size: int) -> None:
    if recipe.train.micro_batch_tokens is not None:
        _check_batches_in_tokens(recipe, data_parallel_size)
        return
    parallel, micro = recipe.parallel, recipe.train.micro_batch_size
    batch, share = recipe.train.global_batch_size, micro * data_parallel_size
    if batch % share:
        raise UserError(
            f"train.global_batch_size={batch} is not a multiple of train.micro_batch_size={micro} "
            f"x data_parallel_size={data_parallel_size}; every rank takes the same number of full "
            f"microbatches. Set train.global_batch_size to {_neighbours(batch, share)}.")
    pipeline, num_microbatches = parallel.pipeline_model_parallel_size, batch // share
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    if interleaved and num_microbatches % pipeline:
        raise UserError(
            f"train.global_batch_size={batch} makes {num_microbatches} microbatch(es) per rank, "
            f"not a multiple of parallel.pipeline_model_parallel_size={pipeline}; the interleaved "
            "schedule runs them in groups of that size. Set train.global_batch_size to "
            f"{_neighbours(batch, share * pipeline)}.")


def _check_stages(parallel: ParallelConfig, num_layers: int) -> None:
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    if num_layers % (pipeline * virtual) == 0:
        return
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    also = f" x parallel.virtual_pipeline_model_parallel_size={virtual}" if interleaved else ""
    working = [n for n in _divisors(num_layers // virtual) if n > 1 or not interleaved
               ] if num_layers % virtual == 0 else []
    advice = (f"Set parallel.pipeline_model_parallel_size to {_either(working)}" if working else
              f"Set parallel.virtual_pipeline_model_parallel_size to a divisor of {num_layers}")
    raise UserError(f"parallel.pipeline_model_parallel_size={pipeline}{also} does not divide "
                    f"num_layers={num_layers}; every stage holds the same number of layers. "
                    f"{advice}.")


def _check_batches_in_tokens(recipe: Recipe, data_parallel_size: int) -> None:
    """Each item may need a microbatch of its own, and the schedule takes them in groups."""
    parallel, train = recipe.parallel, recipe.train
    if train.micro_batch_size != 1:
        raise UserError(
            f"train.micro_batch_tokens={train.micro_batch_tokens} conflicts with "
            f"train.micro_batch_size={train.micro_batch_size}; a microbatch is filled by tokens or "
            "by number. Remove one of them.")
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    group = parallel.pipeline_model_parallel_size if interleaved else 1
    unit, batch = data_parallel_size * group, train.global_batch_size
    if batch % unit:
        stages = f" x pipeline_model_parallel_size={group}" if interleaved else ""
        raise UserError(
            f"train.global_batch_size={batch} is not a multiple of data_parallel_size="
            f"{data_parallel_size}{stages}; every rank takes the same number of microbatches. Set "
            f"train.global_batch_size to {_neighbours(batch, unit)}.")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _neighbours(value: int, step: int) -> str:
    """The multiples of ``step`` on either side of ``value``, in words."""
    below = value // step * step
    return _either([n for n in (below, below + step) if n > 0])


def _either(numbers: list[int]) -> str:
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
