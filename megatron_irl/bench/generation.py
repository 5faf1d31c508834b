"""Generation, timed: whole calls, prompts alone, the steps between, ragged budgets beside equal."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_irl.bench.timing import median_seconds
from megatron_irl.bench.work import Case, Range, random_pairs
from megatron_irl.families.architecture import Architecture
from megatron_irl.flops import experts_hit, layer_parameters
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.policy.policy import Policy
from megatron_irl.run.speed import Speedometer
from megatron_irl.types import Pair

Sample = Callable[[Sequence[int]], Callable[[int], Any]]
"""Of the budget of every request, a call that samples this replica's."""


def time_generation(policy: Policy, case: Case, speed: Speedometer) -> dict[str, Any]:
    """Medians of sampling for the case's requests, each of the longest response.

    ``bandwidth_utilisation`` is of whole calls and weights alone, as in a run's metrics;
    ``decode_bandwidth_utilisation`` of the decode steps, with the cache.

    Collectives: every rank calls.
    """
    arch, ranks, new = policy.architecture, policy.sampling_ranks(), case.response.high
    pairs = random_pairs(arch.vocab_size, case.requests, case.prompt, case.response, seed=0)
    share = slice(ranks.dp_rank, None, ranks.dp_size)
    mine = pairs[share]
    # No token ends a response: every one has its whole budget.
    sampling = SamplingConfig(
        seed=1, eos_id=arch.vocab_size, max_new_tokens=new,
        temperature=case.recipe.generation.temperature or 1.0,
    )

    def sample(budgets: Sequence[int]) -> Callable[[int], Any]:
        return lambda _: policy.generate_share(
            [p.prompt_ids for p in mine], sampling, keys=[p.ordinal for p in mine],
            max_new_tokens=budgets[share],
        )

    whole, host_share = _timed(policy, sample([new] * case.requests), case)
    prefill = median_seconds(sample([1] * case.requests), case)
    found = {"seconds": whole, "tokens_per_second": case.requests * new / whole,
             "prefill_seconds": prefill, "requests": case.requests}
    if host_share is not None:
        found["host_share"] = host_share
    most = case.recipe.generation.max_requests
    places = min(len(mine), -(-most // ranks.tp_size) * ranks.tp_size) or 1  # as the engine rounds
    steps = -(-len(mine) // places) * (new - 1)  # a queue is worked off place by place
    if steps:
        found["decode_step_seconds"] = (whole - prefill) / steps
        found |= _bandwidth(policy, speed, mine[:places], found["decode_step_seconds"], new)
    found |= speed.generation(found, places)
    if case.ragged:
        found |= _ragged(policy, sample, case)
    costs = policy.generation_costs()
    policy.release_cache()
    return found | {name: costs[name] for name in ("graphs", "replicas") if name in costs}


def _timed(
    policy: Policy, work: Callable[[int], Any], case: Case
) -> tuple[float, float | None]:
    """Median seconds of a call, and the share in which a GPU waited for the host between bursts."""
    policy.generation_costs()  # what it tells below counts from here
    seconds = median_seconds(work, case)
    waited = policy.generation_costs().get("host_seconds")
    calls = case.warmup + case.steps
    return seconds, None if waited is None else waited / calls / seconds


def _bandwidth(
    policy: Policy, speed: Speedometer, pairs: Sequence[Pair], seconds: float, new: int
) -> dict[str, float]:
    """Share of the device's bandwidth that a decode step takes, if that is known."""
    if speed.machine is None or seconds <= 0:
        return {}
    ranks, context = policy.sampling_ranks(), sum(len(p.prompt_ids) + new / 2 for p in pairs)
    read = bytes_of_step(
        policy.architecture, context, policy.config.params_dtype.itemsize, requests=len(pairs))
    shared_by = ranks.tp_size * ranks.pp_size
    return {"decode_bandwidth_utilisation": read / shared_by / speed.machine.bandwidth / seconds}


def bytes_of_step(
    arch: Architecture, context: float, element: int, *, requests: int
) -> float:
    """What a decode step reads at least: layers, head, and the cache of all requests.

    Of the embedding, unless it is the head, it reads a row a request, which is not counted. Of a
    mixture's experts it reads those that the requests' tokens hit (``flops.experts_hit``).

    Args:
        context: Tokens in the cache, over all requests.
        element: Bytes of a number.
    """
    layers = arch.transformer["num_layers"]
    weights = layers * layer_parameters(arch, experts_hit(arch, requests))
    weights += arch.dims["hidden"] * arch.vocab_size
    return element * (weights + 2.0 * layers * arch.dims["kv"] * context)


def budgets_of(response: Range, requests: int) -> tuple[list[int], list[int]]:
    """(equal, unequal) budgets of all requests, of the same sum: in pairs of low + high tokens."""
    both = response.low + response.high
    middle = both // 2
    drawn = np.random.default_rng(1).integers(response.low, response.high + 1, requests // 2)
    rest = [middle] * (requests % 2)
    equal = [middle, both - middle] * (requests // 2) + rest
    return equal, [*drawn.tolist(), *(both - drawn).tolist(), *rest]


def _ragged(policy: Policy, sample: Sample, case: Case) -> dict[str, float]:
    """Tokens a second with equal and with unequal budgets, and the second over the first."""
    equal, unequal = budgets_of(case.response, case.requests)
    even = sum(equal) / median_seconds(sample(equal), case)
    seconds, host_share = _timed(policy, sample(unequal), case)
    uneven = sum(unequal) / seconds
    found = {"equal_tokens_per_second": even, "ragged_tokens_per_second": uneven,
             "ragged_to_equal": uneven / even}
    return found if host_share is None else found | {"ragged_host_share": host_share}
