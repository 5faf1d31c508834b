"""Both ways to a block of log-probabilities, on the ranks of a distributed test."""

from functools import partial
from typing import Any

import numpy as np
import torch

import megatron_irl.hardware  # noqa: F401  (must precede megatron)
from megatron_irl.algorithms.sft import likelihood_objective, smoothed_objective
from megatron_irl.parallel.logprobs import _BlockedLogprobs
from megatron_irl.parallel.vocabulary_block import EagerBlock, FusedBlock
from megatron_irl.train.batches import microbatches_for
from megatron_irl.types import Demonstration
from tests.dist.jobs import Layout, build, build_trainer, multiple_of, random_sequences


def train_sft(
    hf: str, layout: Layout, seed: int, vocab: int, micro_batch_tokens: int | None = None,
    smoothing: float | None = None, rows_at_once: int = 2048,
) -> tuple[float, float, float]:
    """(loss, gradient norm, log-probability a token) of a step on demonstrations.

    Their microbatches differ in tokens.
    """
    optimizer = {"lr": 1e-3, "clip_grad": 0.0}
    stepper = build_trainer(hf, layout, optimizer, rows_at_once=rows_at_once)
    demonstrations = [
        Demonstration(i, prompt, response, "", "", None, "")
        for i, (prompt, response) in enumerate(random_sequences(seed, 12, vocab))
    ]
    batches = microbatches_for(
        demonstrations, stepper.policy.topology, micro_batch_tokens=micro_batch_tokens,
        multiple_of=multiple_of(layout),
    )
    if smoothing is None:
        result = stepper.train_step(batches, likelihood_objective)
    else:
        objective = partial(smoothed_objective, smoothing=smoothing)
        result = stepper.train_step(batches, objective, heads="smoothed")
    return result.loss, result.grad_norm, result.metrics["logp/demo_per_token"]


def both_blocks(
    hf: str, layout: Layout, seed: int, block_size: int, softcap: float | None = None,
    rows: int = 17, with_mean: bool = False,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(eager, fused) values, gradients of hidden rows and gradients of the weight, on this rank.

    ``with_mean``: values and gradient of the mean over the vocabulary besides.
    """
    topology, chunks, _, _ = build(hf, layout)
    # The second rank's slice ends before the first one's.
    weight = chunks[-1].output_layer.weight.detach()[: 50 - 3 * topology.tp_rank]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, weight.shape[1], generator=generator)
    targets = torch.randint(0, 50 + 47 * (topology.tp_size - 1), (rows,), generator=generator)
    grads = torch.randn(2, rows, generator=generator)[: 1 + with_mean]
    results: list[list[Any]] = []
    for make_block in (EagerBlock, FusedBlock):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        outputs = _BlockedLogprobs.apply(
            *inputs, targets, 50 * topology.tp_rank, block_size, topology.tp_group, softcap,
            make_block, True, None, None, with_mean,
        )[: 1 + with_mean]
        torch.autograd.backward(outputs, list(grads))
        assert all(x.grad is not None and x.grad.abs().max() > 0.01 for x in inputs)
        results.append([*(x.detach().numpy() for x in outputs),
                        *(x.grad.numpy() for x in inputs)])  # type: ignore[union-attr]
    return list(zip(*results, strict=True))
