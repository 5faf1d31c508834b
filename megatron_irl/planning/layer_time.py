"""Seconds of a microbatch on a pipeline stage: a roofline, with shares of the peaks.

The shares were measured on one H100 (docs/results.md, "One H100"); other devices are taken to reach
the same shares of theirs. Those of mixtures of experts were measured nowhere: they follow from what
their layers move and multiply.
"""

from megatron_irl.flops import (
    Tokens,
    attended,
    expert_parameters,
    experts_hit,
    layer_parameters,
)
from megatron_irl.planning.layout import Setup
from megatron_irl.planning.state import element_size, gradient_size

PRODUCTS = 0.66  # of the peak: bf16 matrix products
FP8_GAIN = 1.49  # of those products in FP8 over bf16, casts included
FP32_SHARE = 1 / 15  # of bf16's peak
ATTENTION = 0.40  # of bf16's peak: fused attention, its recomputation in the backward counted
ELEMENTWISE = 0.47  # of the memory's bandwidth: norms, activations, additions, rotations
DECODE = 0.85  # likewise: weights and cache while decoding
LINK = 0.75  # of the links' speed: collectives
HOST_LAYER = 5.6e-3  # seconds of Python for a layer's forward and backward


def microbatch_seconds(
    setup: Setup, pack: Tokens, *, has_head: bool = True, backward: bool = True,
    is_adapter: bool = False,
) -> float:
    """Of one microbatch on the slowest stage, forward and backward."""
    arch, machine, layers = setup.arch, setup.machine, setup.layers
    passes = 1.0
    if backward:
        passes = (2.0 if is_adapter else 3.0) + _recomputed(setup)
    rate = PRODUCTS * peak(setup)
    layer_rate = rate * FP8_GAIN if setup.recipe.precision == "fp8" and machine.fp8 else rate
    weights = 2.0 * layers * layer_parameters(arch) * pack.sum / setup.tp * passes / layer_rate
    if arch.dims["experts"]:
        weights += layers * _waiting_for_experts(
            setup, pack.sum, passes, layer_rate, trains=backward and not is_adapter)
    attention_passes = passes + (1.0 if is_adapter and backward else 0.0)
    attention = 4.0 * layers * arch.dims["q"] * attended(arch, pack) / setup.tp
    attention *= attention_passes / (ATTENTION * peak(setup))
    moved = elementwise_bytes(setup) * pack.sum + _copied_bytes(setup, pack)
    elementwise = layers * moved * passes / 3 / (ELEMENTWISE * machine.bandwidth)
    host = HOST_LAYER * layers * passes / 3
    head = _head(setup, pack, backward=backward) if has_head else 0.0
    return max(weights + attention + elementwise + head, host) + _tensor_parallel(
        setup, pack, passes)


def peak(setup: Setup) -> float:
    """FLOP/s at most of matrix products that are not in 8 bits."""
    return setup.machine.bf16 * (FP32_SHARE if setup.recipe.precision == "fp32" else 1.0)


def _recomputed(setup: Setup) -> float:
    """Forward passes done again."""
    if setup.config.recompute_granularity == "full":
        return 1.0
    modules = setup.config.recompute_modules if setup.config.recompute_granularity else ()
    if setup.arch.dims["experts"] and "moe" in (modules or ()):
        experts = setup.chosen * expert_parameters(setup.arch)
        return experts / layer_parameters(setup.arch)
    return 0.35 if "mlp" in (modules or ()) else 0.02 if modules else 0.0


def elementwise_bytes(setup: Setup) -> float:
    """Bytes a layer and token moved by everything that is no product, forward and backward."""
    dims, transformer = setup.arch.dims, setup.arch.transformer
    wide = 16.0 if transformer.get("gated_linear_unit") else 10.0
    shared = 44.0 * dims["hidden"]  # two norms and two additions
    if setup.recipe.parallel.sequence_parallel:
        shared /= setup.tp
    mlp, sorting = wide * dims["ffn"], 0.0
    if dims["experts"]:
        chosen = setup.chosen
        # A token's rows are gathered and added up, by each rank of its own tokens, and sorted by
        # expert and back, on every rank with slices of the experts. What is between the products
        # is multiplied by the router's float32 weights: 46 bytes forward and backward.
        mlp = chosen * ((wide + 46.0) * dims["ffn"] + 20.0 * dims["hidden"])
        sorting = chosen * 16.0 * dims["hidden"] / setup.ep
    split = mlp + 8.0 * (dims["q"] + dims["kv"])
    return (shared + sorting + split / setup.tp) * element_size(setup.recipe) / 2


def _copied_bytes(setup: Setup, pack: Tokens) -> float:
    """Bytes a layer moves between shared prompts and attention's sequences, there and back."""
    if not pack.again:
        return 0.0
    dims = setup.arch.dims
    rows = 4.0 * (dims["qkv"] + dims["q"]) * pack.whole
    return rows / setup.tp * element_size(setup.recipe)


def _waiting_for_experts(
    setup: Setup, tokens: float, passes: float, rate: float, *, trains: bool
) -> float:
    """Seconds that a layer's experts take to be read beyond those of their products.

    Each gets few of a pack's tokens, and its weights are read for them in every pass, gradients
    read and written.

    Args:
        rate: FLOP/s of the products.
        trains: Whether the experts' weights have gradients.
    """
    arch, element = setup.arch, element_size(setup.recipe)
    expert = expert_parameters(arch) / setup.tp
    moved = element * passes + (2 * gradient_size(setup.recipe) - element) * trains
    reading = experts_hit(arch, tokens) * expert * moved / (DECODE * setup.machine.bandwidth)
    return max(0.0, reading - 2.0 * setup.chosen * expert * tokens * passes / rate)


def _head(setup: Setup, pack: Tokens, *, backward: bool) -> float:
    """The head on response rows: three products and one again for all blocks but the last."""
    machine = setup.machine
    product = 2.0 * setup.arch.dims["hidden"] * setup.vocabulary * pack.rows
    block = setup.recipe.train.logprob_rows * (8 // element_size(setup.recipe))
    again = max(0.0, 1 - block / max(pack.rows, 1))
    passes = 3.0 + again if backward else 1.0
    moved = pack.rows * setup.vocabulary * element_size(setup.recipe) * (6 if backward else 2)
    # The other stages wait for the last one.
    return product * passes / (PRODUCTS * peak(setup)) + moved / (ELEMENTWISE * machine.bandwidth)


def _tensor_parallel(setup: Setup, pack: Tokens, passes: float) -> float:
    """Two all-reduces a layer and pass, or what sequence parallelism makes of them.

    Experts' is of as many rows a token as it has experts.
    """
    if setup.tp == 1:
        return 0.0
    size = pack.sum * setup.arch.dims["hidden"] * element_size(setup.recipe)
    ring = 2 * (setup.tp - 1) / setup.tp * size / (LINK * link_speed(setup, setup.tp))
    # To ranks with experts of their own a row is sent once, to ranks with slices to each.
    times = 1 + (setup.chosen / setup.ep if setup.arch.dims["experts"] else 1)
    return setup.layers * times * min(passes, 2.0 + _recomputed(setup)) * ring


def link_speed(setup: Setup, ranks: int) -> float:
    machine = setup.machine
    return machine.link if ranks <= machine.per_node else machine.network
