"""``megatron-irl plan``: what a recipe would do, and the memory of its weights, before it runs."""

from megatron_irl.config import Recipe, check_layout
from megatron_irl.convert.hf_config import Architecture
from megatron_irl.data.demonstrations import Limits
from megatron_irl.data.inspection import describe_lengths, show_records
from megatron_irl.families.table import rows
from megatron_irl.run.inputs import Inputs, read_inputs
from megatron_irl.train.optimizer import shards_optimizer

GIB = 1024**3


def describe_plan(recipe: Recipe, show: int | None = None) -> str:
    """Check what ``train`` checks, then describe rounds, batches and memory as text.

    Not checked is whether this machine can run it: a plan is made on a login node too.

    Args:
        recipe: As loaded.
        show: Show so many demonstrations as the model sees them, and the lengths of all.

    Raises:
        UserError: As ``train`` would.
    """
    dp_size = check_layout(recipe, None)
    inputs = read_inputs(recipe, check_hardware=False, keeps_tokens=False)
    lines = [*inputs.notes, *_work(inputs), *_memory(inputs, dp_size)]
    if recipe.precision == "fp8":
        lines.append("the hardware was not checked: precision=fp8 needs GPUs of compute capability "
                     "8.9 or newer (Blackwell for mxfp8) and Transformer Engine")
    if show is not None:
        lines += _demonstrations(inputs, show)
    return "\n".join(lines) + "\n"


def _demonstrations(inputs: Inputs, show: int) -> list[str]:
    options, data = inputs.recipe.data, inputs.data
    limits = Limits(options.max_prompt_length, options.max_response_length, options.overlong)
    return [
        *show_records(data.demonstrations, inputs.tokenizer, show),
        *describe_lengths(data.report, limits, data.demonstrations,
                          inputs.architecture.max_sequence_length),
    ]


def count_parameters(arch: Architecture) -> int:
    """Parameters of the whole model; a tied head counts once."""
    total = 0
    for row in rows(arch):
        for tensor in row.hf:
            size = 1
            for length in tensor.shape(arch):
                size *= length
            total += size
    return total


def _work(inputs: Inputs) -> list[str]:
    recipe, rules = inputs.recipe, inputs.algorithm
    algorithm, num_demonstrations = recipe.algorithm, len(inputs.data.demonstrations)
    lines = [
        f"{algorithm.name}: {algorithm.rounds} rounds of {rules.describe_steps(recipe)}, "
        f"{num_demonstrations} demonstrations"
    ]
    if rules.draws_samples:
        prompts = algorithm.prompts_per_round or 0
        samples = rules.samples_per_prompt(recipe)
        times = f" {samples} times" if samples > 1 else ""
        lines.append(
            f"each round samples {prompts} prompts{times}, up to "
            f"{recipe.generation.max_new_tokens} new tokens each, in "
            f"{-(-prompts // recipe.generation.part_size)} committed parts"
        )
        passes = algorithm.rounds * prompts / num_demonstrations
    else:
        steps = algorithm.rounds * (algorithm.steps_per_round or 0)
        passes = steps * recipe.train.global_batch_size / num_demonstrations
    return [*lines, f"{passes:.2f} passes over the demonstrations"]


def _memory(inputs: Inputs, dp_size: int) -> list[str]:
    """Weights, gradients and optimizer state of the fullest rank; activations are not included."""
    recipe, arch = inputs.recipe, inputs.architecture
    tp = recipe.parallel.tensor_model_parallel_size
    pp = recipe.parallel.pipeline_model_parallel_size
    total = count_parameters(arch)
    embedding = arch.vocab_size * arch.transformer["hidden_size"]
    heads = 1 if arch.tie_word_embeddings else 2
    # A stage holds its layers; the first holds the embedding, the last the head.
    fullest = ((total - heads * embedding) / pp + embedding * (heads if pp == 1 else 1)) / tp
    weight_bytes = 4 if recipe.precision == "fp32" else 2
    main_bytes = 0 if recipe.precision == "fp32" else 4
    share = dp_size if shards_optimizer(recipe) else 1
    parts = {
        "weights": fullest * weight_bytes,
        "gradients (fp32)": fullest * 4,
        "optimizer": fullest * (main_bytes + 8) / share,
    }
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return [
        f"{total / 1e9:.3f} B parameters; tensor {tp} x pipeline {pp} x data {dp_size} = "
        f"{tp * pp * dp_size} ranks; {recipe.precision}",
        f"fullest rank, GiB: {sizes}; together {sum(parts.values()) / GIB:.2f}, plus activations; "
        "no reference model",
    ]
