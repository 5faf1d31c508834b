"""A step of the product on gloo ranks, its allocations counted by torch's allocator."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import megatron_irl.hardware  # noqa: F401  (must precede megatron)
from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture
from megatron_irl.model.build import build_chunks, build_config, unwrap
from megatron_irl.model.data_parallel import build_ddp_config
from megatron_irl.parallel.topology import initialize
from megatron_irl.planning.fake_world import Ledger
from megatron_irl.policy.policy import Policy
from megatron_irl.train.batches import microbatches_for
from megatron_irl.train.optimizer import build_megatron_optimizer
from megatron_irl.train.step import Stepper
from megatron_irl.types import Pair
from tests.dist.jobs import objective

from megatron.core.optimizer import OptimizerConfig  # isort: skip


def pairs_of(count: int, tokens: int) -> list[Pair]:
    """Pairs of two sequences of so many tokens, a quarter of them of the response.

    Of random ids: experts would all get the tokens of one.
    """
    ids = np.random.default_rng(0).integers(2, 2048, (count, tokens), np.int32)
    prompts, responses = np.split(ids, [3 * tokens // 4], axis=1)
    return [Pair(i, prompt, response, response, np.zeros(1, np.float32), "stop",
                 ref_demo_logp=0.0, ref_sample_logp=0.0)
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))]


def measured(
    hf_config: dict[str, Any], layout: dict[str, Any], model: dict[str, Any], *, tokens: int,
    pairs: int, micro: int, rows_at_once: int,
) -> dict[str, int]:
    """Of this rank in bytes: weights, gradients, optimizer, and the most a step allocated."""
    torch.manual_seed(0)
    parallel = ParallelConfig(**layout)
    topology, arch = initialize(parallel), architecture(hf_config)
    config = build_config(arch, parallel, precision="fp32", overrides=model)
    chunks = build_chunks(config, arch, topology)
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
    policy = Policy(chunks, topology, arch, rows_at_once=rows_at_once).for_training(
        build_ddp_config())
    optimizer = build_megatron_optimizer(
        OptimizerConfig(params_dtype=torch.float32, lr=1e-4, use_distributed_optimizer=True),
        policy.chunks, topology,
    )
    stepper = Stepper(policy, optimizer)

    def step() -> None:
        packs = microbatches_for(pairs_of(pairs, tokens), topology, micro_batch_size=micro,
                                 multiple_of=policy.multiple_of)
        stepper.train_step(packs, objective)

    step()  # tables and Adam's moments are made once
    made = policy.chunks if topology.tp_size > 1 or topology.dp_size > 1 else None
    most = _most_tensors(step, made) if made else _most_allocated(step)
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    moments = {id(t): t.nbytes for part in parts for state in part.optimizer.state.values()
               for t in state.values() if isinstance(t, torch.Tensor) and t.dim()}
    return {
        "weights": sum(p.nbytes for c in policy.chunks for p in unwrap(c).parameters()),
        "gradients": sum(b.grad_data.nbytes for b in _gradients(policy.chunks)),
        "optimizer": sum(moments.values()), "step": most,
    }


def _gradients(chunks: Sequence[Any]) -> list[Any]:
    """Megatron's buffers: of what all ranks of a replica share or split, and of whole experts."""
    return [b for c in chunks for b in (*vars(c)["buffers"], *c.expert_parallel_buffers)]


def _most_tensors(step: Callable[[], None], chunks: Sequence[Any]) -> int:
    """Most bytes of tensors that a step had made and not yet freed at one time.

    With collectives of several ranks: gloo's threads free what they took where torch's profiler
    does not look, and its count would only grow.
    """
    models = [unwrap(c) for c in chunks]
    known = [t for c in models for t in (*c.parameters(), *c.buffers())]
    known += [b.grad_data for b in _gradients(chunks)]
    with Ledger(known) as ledger:
        step()
    return ledger.peak


def _most_allocated(step: Callable[[], None]) -> int:
    """Most bytes that torch's allocator had given out and not got back at one time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    results: Any = profiler.profiler
    found = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(found, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
