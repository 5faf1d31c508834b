"""Seconds of a round's parts, as ``layer_time`` has those of a microbatch.

docs/scaling.md compares with figures that were not used.
"""

from dataclasses import dataclass

from megatron_irl.flops import Tokens, experts_hit, layer_parameters, unused_parameters
from megatron_irl.generation.cache_size import tokens_to_all_experts
from megatron_irl.planning.layer_time import (
    DECODE,
    HOST_LAYER,
    LINK,
    PRODUCTS,
    link_speed,
    microbatch_seconds,
    peak,
)
from megatron_irl.planning.layout import Setup
from megatron_irl.planning.memory import checkpoint_share
from megatron_irl.planning.state import element_size, gradient_size, offloaded_share
from megatron_irl.planning.workload import PhaseWork, Workload
from megatron_irl.policy.score_packs import pack_weight
from megatron_irl.policy.scoring import GPU_PACK_TOKENS

UPDATE_BYTES = (22.0, 40.0)  # of Adam, a parameter: on all of them, and on the rank's share
HOST_UPDATE = 1e9  # parameters a second that Adam updates on the host; not measured
HOST_LINK = 25e9  # bytes a second between device and host
WRITER = 0.4e9  # bytes a second that one rank writes of a checkpoint
HOST_COPY = 1e9  # likewise that it copies to host memory before that, into untouched pages
DECODE_LAYER = 50e-6  # seconds a layer and decode step beyond reading, and
DECODE_REQUEST = 2.5e-6  # a request of it
EXPERT = 1e-6  # likewise a product of an expert, of which some run at a time; not measured
COLLECTIVE = 12e-6  # latency of an all-reduce in a decode step
FULL_SLOTS = 0.8  # how full the engine's places are on average


@dataclass(frozen=True)
class RoundTime:
    """Seconds of a round's parts, and speeds.

    Attributes:
        seconds: By part.
        step: Seconds of one optimizer step of each phase.
        tokens_per_second: Trained tokens a second and rank, of each phase.
        bubble: Share of a step's time that stages wait for each other.
        decode_step: Seconds of one decode step at ``decode_batch`` requests.
        decode_tokens_per_second: Of all replicas.
        checkpoint: Of one checkpoint: seconds that training waits, and that are behind it.
    """

    seconds: dict[str, float]
    step: dict[str, float]
    tokens_per_second: dict[str, float]
    bubble: float
    decode_step: float
    decode_tokens_per_second: float
    checkpoint: tuple[float, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def generation_share(self) -> float:
        return self.seconds.get("generation", 0.0) / self.total if self.total else 0.0


def round_time(
    setup: Setup, work: Workload, *, parameters: int, adapter: int | None = None,
    whole: int | None = None,
) -> RoundTime:
    """Of one round.

    Args:
        parameters: Of the fullest rank.
        whole: Of all stages together, where those generate as replicas.
        adapter: Trained parameters of the fullest rank where an adapter is trained alone.
    """
    trained = parameters if adapter is None else adapter
    steps = {p.name: step_seconds(setup, p, trained, is_adapter=adapter is not None)
             for p in work.phases}
    speeds = {p.name: sum(pack.whole for pack in p.packs) / steps[p.name] / (setup.tp * setup.pp)
              for p in work.phases}
    seconds = {"training": sum(steps[p.name] * p.steps for p in work.phases)}
    decode, rate = 0.0, 0.0
    if work.samples:
        held = whole if setup.replicas and whole else parameters
        generation, decode, rate = _generation(setup, work, held, sent=held - parameters)
        seconds = {"generation": generation, "reference": _reference(setup, work)} | seconds
    checkpoint = checkpoint_seconds(setup, trained)
    saves = _saves(setup, sum(p.steps for p in work.phases), seconds["training"])
    seconds["checkpoint"] = saves * checkpoint[0]
    microbatches = max((len(p.packs) for p in work.phases), default=1)
    idle = (setup.pp - 1) / setup.vpp
    bubble = idle / (microbatches + idle)
    return RoundTime(seconds, steps, speeds, bubble, decode, rate, checkpoint)


def checkpoint_seconds(setup: Setup, trained: int) -> tuple[float, float]:
    """(seconds that training waits, seconds of writing behind it) of one checkpoint."""
    share = checkpoint_share(setup, trained)
    if setup.recipe.checkpoint.asynchronous:
        return share / HOST_COPY, share / WRITER
    return share / WRITER, 0.0


def _saves(setup: Setup, steps: int, seconds: float) -> int:
    """Checkpoints of a round: at its end, and those of ``interval`` and ``interval_minutes``."""
    options = setup.recipe.checkpoint
    within = (steps - 1) // options.interval if options.interval else 0
    if options.interval_minutes:
        within += int(seconds / (60 * options.interval_minutes))
    return 1 + max(0, within)


def step_seconds(
    setup: Setup, phase: PhaseWork, trained: int, *, is_adapter: bool = False
) -> float:
    """Of one optimizer step: microbatches through the pipeline, gradients exchanged, the update."""
    times = [microbatch_seconds(setup, pack, has_head=phase.has_head, is_adapter=is_adapter)
             for pack in phase.packs]
    mean = sum(times) / len(times)
    pipeline = sum(times) + mean * (setup.pp - 1) / setup.vpp
    return pipeline + update_seconds(setup, trained) + _exchange(setup, trained)


def _exchange(setup: Setup, trained: int) -> float:
    """Gradients reduced over data parallelism, parameters gathered; overlapped if asked."""
    if setup.dp == 1:
        return 0.0
    speed = LINK * link_speed(setup, setup.world_size)
    share = (setup.dp - 1) / setup.dp
    sizes = gradient_size(setup.recipe), element_size(setup.recipe)
    times = [trained * size * share / speed for size in sizes]
    asked = (setup.recipe.ddp.get("overlap_grad_reduce"),
             setup.recipe.ddp.get("overlap_param_gather"))
    return sum(t * (0.2 if overlapped else 1.0) for t, overlapped in zip(times, asked, strict=True))


def update_seconds(setup: Setup, trained: int) -> float:
    """Of Adam, and what goes with it: norms, zeroing, copies."""
    share = setup.dp if setup.shards_optimizer else 1
    everywhere, own = UPDATE_BYTES
    moved = offloaded_share(setup.recipe)  # to the host: gradients there, weights back
    device = trained * (everywhere + own / share * (1 - moved)) / setup.machine.bandwidth
    there = trained * moved / share
    return device + there * (1 / HOST_UPDATE + 2 * element_size(setup.recipe) / HOST_LINK)


def _reference(setup: Setup, work: Workload) -> float:
    """A forward pass over the demonstrations and samples of a round."""
    one = work.of_a_prompt
    weight = pack_weight(one.sum, one.whole)
    times = GPU_PACK_TOKENS / weight
    times = times if times < 1 else float(int(times))  # of a prompt's responses some, or all
    packs, pack = work.prompts / times / setup.dp, one * times
    return (packs + setup.pp - 1) * microbatch_seconds(setup, pack, backward=False)


def _generation(
    setup: Setup, work: Workload, parameters: int, *, sent: int
) -> tuple[float, float, float]:
    """(seconds, seconds a decode step, tokens a second over all replicas) of a round's samples.

    Args:
        parameters: Of a rank while it generates, and
        sent: how many of them come from other stages.
    """
    lengths, options = work.lengths, setup.recipe.generation
    prompt, new = float(lengths.prompt.mean()), float(lengths.sample.mean())
    per_replica = work.samples / setup.generators
    batch = min(options.max_requests, max(1.0, per_replica))
    step = decode_seconds(setup, round(batch), prompt + new / 2, parameters)
    prefill = Tokens.of([(round(prompt), 0)])
    forward = microbatch_seconds(setup, prefill, has_head=False, backward=False) - (
        HOST_LAYER * setup.layers / 3)
    products = 2.0 * setup.layers * layer_parameters(setup.arch) * prompt / setup.tp / (
        PRODUCTS * peak(setup))
    prefills = per_replica * max(forward, products * 1.25) * setup.pp
    full = FULL_SLOTS if per_replica > batch else 1.0
    seconds = prefills + per_replica * new / (batch * full) * step
    seconds += sent * element_size(setup.recipe) / (LINK * link_speed(setup, setup.world_size))
    return seconds, step, work.samples * new / seconds if seconds else 0.0


def decode_seconds(setup: Setup, batch: int, context: float, parameters: int) -> float:
    """Of one decode step of one replica through CUDA graphs: all stages in turn, if it has some.

    Of a mixture all experts are read and multiplied with every token. Where requests are too many
    for that, those are that their tokens hit, without graphs: the host starts every layer.

    Args:
        context: Tokens in the cache of a request.
        parameters: Of a rank.
    """
    arch, stages = setup.arch, 1 if setup.replicas else setup.pp
    here = setup.layers * setup.pp // stages
    cache = 2.0 * here * arch.dims["kv"] / setup.tp * context * batch * element_size(setup.recipe)
    # An untied embedding is not read, but for a row a request.
    embedding = 0 if arch.tie_word_embeddings else arch.dims["hidden"] * setup.vocabulary
    share = here / arch.transformer["num_layers"] / setup.tp
    experts = arch.dims["experts"]
    to_all = experts and batch <= tokens_to_all_experts(setup.config)
    unread = 0.0 if to_all else share * unused_parameters(arch, experts_hit(arch, batch))
    idle = 0.0 if to_all else share * unused_parameters(arch, setup.chosen)
    read = (parameters - unread - embedding * (stages == 1)) * element_size(setup.recipe) + cache
    reading = read / (DECODE * setup.machine.bandwidth)
    products = 2.0 * (parameters - idle) * batch / (PRODUCTS * peak(setup))
    layers = here * (DECODE_LAYER + (2 * COLLECTIVE if setup.tp > 1 else 0.0))
    stage = max(reading, products) + layers
    if to_all:
        stage += here * 2 * experts / setup.ep * EXPERT
    elif experts:
        stage = max(stage, here * HOST_LAYER / 3)
    return stages * stage + DECODE_REQUEST * batch
