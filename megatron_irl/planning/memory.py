"""Bytes of a rank by term and phase, for every pipeline stage."""

import copy
import math
from dataclasses import dataclass, field

from megatron_irl.families.linears import targeted_layers
from megatron_irl.families.rows import HEAD
from megatron_irl.flops import Tokens
from megatron_irl.generation.cache_size import (
    CUDA_BLOCK_TOKENS,
    bytes_to_all_experts,
    cache_gb,
    cuda_step_tokens,
    tokens_to_all_experts,
)
from megatron_irl.planning.activations import PerToken, shallow
from megatron_irl.planning.layout import Setup
from megatron_irl.planning.machines import GIB
from megatron_irl.planning.state import (
    checkpoint_bytes,
    copied_bytes,
    element_size,
    offloaded_share,
    training_state,
)
from megatron_irl.planning.workload import PhaseWork, Workload
from megatron_irl.policy.score_packs import pack_weight
from megatron_irl.policy.scoring import GPU_PACK_TOKENS

# Outside of torch's allocator: the CUDA context, cuBLAS and NCCL. What the allocator cannot use
# because its blocks are in pieces is a share of what it holds.
CONTEXT, PER_GROUP, PIECES = 0.7 * GIB, 0.35 * GIB, 0.03
GRAPHS = 0.6 * GIB  # captured graphs and their pool


@dataclass(frozen=True)
class StageMemory:
    """Of one rank of a pipeline stage.

    Attributes:
        parameters, trainable: Elements.
        terms: Bytes by name, each of them held in some of the phases.
        phases: Bytes at the peak of each phase: the sum of the terms that ``parts`` names.
        parts: Which terms a phase holds.
        reserve: Bytes that are not tensors'.
        host: Bytes of host memory by name.
    """

    stage: int
    parameters: int
    trainable: int
    terms: dict[str, float]
    parts: dict[str, tuple[str, ...]]
    reserve: float
    host: dict[str, float] = field(default_factory=dict)

    @property
    def phases(self) -> dict[str, float]:
        return {phase: sum(self.terms[name] for name in names)
                for phase, names in self.parts.items()}

    @property
    def peak(self) -> float:
        """Most bytes of tensors at once."""
        return max(self.phases.values())

    @property
    def needed(self) -> float:
        """What the device must have."""
        return self.with_reserve(self.peak)

    def with_reserve(self, tensors: float) -> float:
        """What the device must have for so many bytes of tensors."""
        return tensors * (1 + PIECES) + self.reserve


def stage_memory(
    setup: Setup, stage: int, parameters: dict[str, tuple[int, int, bool]], activations: PerToken,
    work: Workload, *, worst: bool = False, whole: float = 0.0,
) -> StageMemory:
    """Memory of a rank of one stage.

    Args:
        parameters: As ``parameters_of_stage`` counts them.
        worst: With the longest packs that the limits of the data allow instead of those drawn.
        whole: Bytes of the weights of all stages.
    """
    elements = sum(n for n, _, _ in parameters.values())
    trained = sum(n for n, _, is_trained in parameters.values() if is_trained)
    terms = {"weights": float(sum(n * size for n, size, _ in parameters.values()))}
    if setup.recipe.precision == "fp8":
        layers = sum(n for name, (n, _, _) in parameters.items() if _is_matrix(name))
        terms["fp8 weights"] = 2.0 * layers  # by rows and by columns, cast once a step
    terms |= training_state(setup.recipe, trained, setup.dp)
    terms |= _activations(setup, stage, activations, work, worst=worst)
    held = tuple(n for n in terms if n not in ("activations", "logits", "backward"))
    parts = {"training": tuple(terms)}
    if work.samples:
        terms |= _generation(setup, activations)
        kept = held
        if setup.recipe.generation.offload_optimizer:
            kept = tuple(n for n in held if n not in ("gradients", "optimizer"))
        parts["generation"] = (*kept, "KV cache", "graphs", "prefill")
        if setup.replicas:
            terms["other stages' weights"] = whole - terms["weights"]
            parts["generation"] += ("other stages' weights",)
        one = work.of_a_prompt
        pack = one * (GPU_PACK_TOKENS / pack_weight(one.sum, one.whole))
        terms["reference pass"] = activations.forward_of(pack)
        parts["reference"] = (*held, "reference pass")
        if setup.recipe.algorithm.reference == "initial" and not setup.recipe.adapter.enabled:
            terms["reference weights"] = terms["weights"]
            parts["reference"] += ("reference weights",)
    if copied := copied_bytes(setup.recipe):  # which only the distributed optimizer has
        terms["copies for a checkpoint"] = float(trained * copied / setup.dp)
        parts["checkpoint"] = (*held, "copies for a checkpoint")
    return StageMemory(
        stage, elements, trained, terms, parts, _reserve(setup), _host(setup, trained, terms),
    )


def _is_matrix(name: str) -> bool:
    return "linear_" in name and name.endswith("weight") and "layer_norm" not in name


def _activations(
    setup: Setup, stage: int, per_token: PerToken, work: Workload, *, worst: bool
) -> dict[str, float]:
    """Of the phase that takes most: what is in flight, the head's logits, the backward pass."""
    found = [
        _phase_activations(setup, stage, per_token, phase, pack)
        for phase in work.phases for pack in (phase.worst if worst else phase.largest)
    ]
    nothing = {"activations": 0.0, "logits": 0.0, "backward": 0.0}
    return max(found, key=lambda terms: sum(terms.values()), default=nothing)


def _phase_activations(
    setup: Setup, stage: int, per_token: PerToken, phase: PhaseWork, pack: Tokens
) -> dict[str, float]:
    kept = per_token.kept(pack, setup.layers, chunks=setup.vpp)
    if setup.recipe.precision == "fp8":
        kept += pack.sum * setup.layers * fp8_change(setup)
    in_flight = setup.in_flight(stage, len(phase.packs))
    logits, head = head_memory(setup, pack) if stage == setup.pp - 1 and phase.has_head else (0, 0)
    # The head's backward comes first and frees its logits before the layers' begins.
    backward = max(head, per_token.backward_of(pack) + per_token.gradients - logits)
    return {"activations": kept * in_flight, "logits": logits, "backward": max(0.0, backward)}


def fp8_change(setup: Setup) -> float:
    """Bytes a token and layer that FP8 products keep more: their inputs in one byte, not two.

    What attention gave is kept in bf16 too, for attention's own backward pass.
    """
    if setup.config.recompute_granularity == "full":
        return 0.0
    dims = setup.arch.dims
    if not dims["experts"]:
        return (dims["q"] - 2.0 * dims["hidden"] - dims["ffn"]) / setup.tp
    rows = setup.chosen / setup.ep  # of a token, all of them at every slice
    experts = rows * (dims["hidden"] + dims["ffn"] * setup.ep / setup.tp)
    return (dims["q"] - dims["hidden"]) / setup.tp - experts


def head_memory(setup: Setup, pack: Tokens) -> tuple[float, float]:
    """Bytes of response rows' logits: kept from forward to backward, and more in the backward.

    See ``parallel.logprobs``: one block of logits is kept, in float32 on a CPU, and on a GPU in the
    dtype of the weights with as many more rows.
    """
    at_once, hidden = setup.recipe.train.logprob_rows, setup.arch.dims["hidden"]
    size = element_size(setup.recipe)
    block = min(pack.rows, at_once * (8 // size) if setup.lean else at_once)
    logits = block * setup.vocabulary * (size if setup.lean else 4)
    rows = pack.rows * hidden * size
    weight = setup.vocabulary * hidden * size
    gradients = weight * (1 if pack.rows <= block else 2)
    spread = pack.sum * hidden * size  # rows' gradients back among all tokens
    if not setup.lean and size < 4:
        logits_gradient = block * setup.vocabulary * size
    else:
        logits_gradient = 0
    return logits + rows, rows + max(gradients + logits_gradient, spread)


def _generation(setup: Setup, per_token: PerToken) -> dict[str, float]:
    options = setup.recipe.generation
    longest = setup.recipe.data.max_prompt_length + (options.max_new_tokens or 0)
    config = copy.copy(setup.config)
    if setup.replicas:
        config.pipeline_model_parallel_size = 1
    cache = cache_gb(
        config, max_sequence_length=longest, max_requests=options.max_requests,
        block_tokens=CUDA_BLOCK_TOKENS, kv_cache_gb=options.kv_cache_gb,
    )
    tokens = min(cuda_step_tokens(setup.config),
                 options.max_requests * setup.recipe.data.max_prompt_length)
    step = tokens * per_token.forward
    if setup.arch.dims["experts"]:
        small = min(options.max_requests, tokens_to_all_experts(setup.config))
        step = max(step, small * bytes_to_all_experts(setup.config))
    logits = options.max_requests * setup.vocabulary * (element_size(setup.recipe) + 4)
    return {"KV cache": cache * GIB, "graphs": GRAPHS if setup.captures else 0.0,
            "prefill": step + logits}


def _reserve(setup: Setup) -> float:
    groups = sum(size > 1 for size in (setup.tp, setup.pp, setup.dp))
    return CONTEXT + PER_GROUP * groups


def checkpoint_share(setup: Setup, trained: int) -> float:
    """Bytes of a checkpoint that a rank writes: replicas divide weights and optimizer."""
    return trained * checkpoint_bytes(setup.recipe) / setup.dp


def _adapted_bytes(setup: Setup) -> float:
    """Weights of a rank's layers that have adapters: what is kept of them while they are merged."""
    arch = shallow(setup.arch, 1)  # layers are alike, and a mixture has thousands of rows
    elements = sum(
        math.prod(layer.row.shape(arch))
        * (1 if layer.row.megatron == HEAD else setup.arch.dims["layers"])
        for layer in targeted_layers(arch, setup.recipe.adapter.targets)
    )
    return elements / setup.tp / setup.pp * element_size(setup.recipe)


def _host(setup: Setup, trained: int, terms: dict[str, float]) -> dict[str, float]:
    """Of one rank: the copy of a checkpoint while it is written, and what is offloaded."""
    state = 8.0 + (0 if setup.recipe.precision == "fp32" else 4)
    found = {}
    if setup.recipe.checkpoint.asynchronous:
        found["checkpoint being written"] = checkpoint_share(setup, trained)
    if setup.recipe.generation.offload_optimizer:
        found["optimizer while generating"] = terms["gradients"] + terms["optimizer"]
    if setup.recipe.adapter.enabled and setup.recipe.adapter.generation == "merged":
        found["adapted weights while sampling"] = _adapted_bytes(setup)
    if share := offloaded_share(setup.recipe):
        dp = setup.dp if setup.shards_optimizer else 1
        found["offloaded optimizer"] = trained * (state + 4) / dp * share
    return found
