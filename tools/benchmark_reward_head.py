"""Time and memory of an optimizer step with and without the reward head, side by side.

    python tools/benchmark_reward_head.py --model data/SmolLM2-135M-Instruct

One model takes steps on the same pairs in turn: the implicit-reward loss on the language-model
head's log-probabilities alone, and the same loss plus the explicit-reward loss on the reward head,
out of the same forward. Times are medians of alternating steps. Memory is the peak of the step
(resident pages on the CPU, allocated bytes on a GPU), beside it the bytes the head itself keeps:
parameter, gradient, two Adam moments, and under bf16 no master copy, since it is fp32.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_irl import hardware
from megatron_irl.config import ParallelConfig, Precision
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.model.build import build_chunks, build_config, build_ddp_config
from megatron_irl.model.reward_head import attach_reward_head, reward_head
from megatron_irl.objectives import irft_loss, reward_loss, sequence_logprobs
from megatron_irl.parallel.topology import Topology, initialize
from megatron_irl.policy.policy import Policy
from megatron_irl.train.batches import microbatches_for
from megatron_irl.train.optimizer import build_megatron_optimizer, reward_head_group
from megatron_irl.train.step import Stepper
from megatron_irl.types import HeadOutputs, LossOutput, PackedBatch, Pair

from megatron.core.optimizer import (  # isort: skip
    OptimizerConfig,
    get_standard_config_overrides,
)

BETA, LR, HEAD_LR = 0.1, 1e-6, 1e-4


def without_head(logprobs_R: torch.Tensor, batch: PackedBatch) -> LossOutput:
    """The implicit reward's loss."""
    logps_S = sequence_logprobs(logprobs_R, batch.segment_R, batch.num_sequences)
    return irft_loss(logps_S, batch.ref_logps_S, batch.lengths_S, beta=BETA)


def with_head(heads: HeadOutputs, batch: PackedBatch) -> LossOutput:
    """The same, and the explicit reward's."""
    implicit = without_head(heads.logprobs_R, batch)
    explicit = reward_loss(heads.rewards_S, loss="logistic", bound=None)
    return LossOutput(implicit.total + explicit.total, implicit.weight, implicit.metrics)


def make_pairs(count: int, vocab: int, rng: np.random.Generator, prompt: tuple[int, int],
               response: tuple[int, int]) -> list[Pair]:
    """Random pairs with lengths uniform in the given ranges."""

    def ids(bounds: tuple[int, int]) -> np.ndarray:
        return rng.integers(3, vocab, rng.integers(bounds[0], bounds[1] + 1)).astype(np.int32)

    return [
        Pair(i, ids(prompt), ids(response), ids(response), np.zeros(1, np.float32), "stop",
             ref_demo_logp=-50.0, ref_sample_logp=-50.0)
        for i in range(count)
    ]


def build(model: Path, precision: Precision, topology: Topology) -> tuple[Stepper, int]:
    """The stepper of a model with a head, and the model's vocabulary size."""
    arch = architecture(read_hf_config(model))
    config = build_config(arch, ParallelConfig(), precision=precision)
    chunks = build_chunks(config, arch, topology)
    attach_reward_head(chunks, topology)
    policy = Policy(chunks, topology, arch)
    policy.load_weights(model)
    policy = policy.for_training(build_ddp_config())
    options = OptimizerConfig(
        lr=LR, weight_decay=0.0, use_distributed_optimizer=True, bf16=config.bf16,
        params_dtype=config.params_dtype,
    )
    optimizer = build_megatron_optimizer(
        options, policy.chunks, topology,
        overrides=get_standard_config_overrides(options) | reward_head_group(HEAD_LR),
    )
    return Stepper(policy, optimizer), arch.vocab_size


def reset_peak() -> None:
    """Start a new peak measurement."""
    if hardware.IS_CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident pages


def peak_bytes() -> int:
    """The most memory in use since ``reset_peak``."""
    if hardware.IS_CUDA:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def measure(options: argparse.Namespace, topology: Topology) -> dict[str, Any]:
    """Alternate both kinds of step; medians and their ratios."""
    stepper, vocab = build(options.model, options.precision, topology)
    rng = np.random.default_rng(options.seed)
    steps = {
        "without": partial(stepper.train_step, objective=without_head),
        "with": partial(stepper.train_step, objective=with_head, heads="both"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, list[int]] = {name: [] for name in steps}
    for index in range(options.steps + 1):
        pairs = make_pairs(options.pairs, vocab, rng, options.prompt, options.response)
        batches = microbatches_for(
            pairs, topology, micro_batch_size=options.micro_batch_size, multiple_of=1
        )
        # The order alternates too: the second step on a batch finds warm caches.
        for name in sorted(steps, reverse=bool(index % 2)):
            reset_peak()
            hardware.synchronize()
            start = time.perf_counter()
            steps[name](batches)
            hardware.synchronize()
            if index:  # the first is warm-up
                seconds[name].append(time.perf_counter() - start)
                peaks[name].append(peak_bytes())
    head = reward_head(stepper.policy.chunks)
    assert head is not None
    time_with, time_without = (statistics.median(seconds[n]) for n in ("with", "without"))
    peak_with, peak_without = (statistics.median(peaks[n]) for n in ("with", "without"))
    head_bytes = 4 * head.weight.numel() * head.weight.element_size()
    return {
        "precision": options.precision, "device": str(hardware.device()), "steps": options.steps,
        "seconds_without": time_without, "seconds_with": time_with,
        # Each step beside its neighbour: slow drifts of the machine cancel.
        "time_added": statistics.median(
            a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)) - 1,
        "peak_bytes_without": peak_without, "peak_bytes_with": peak_with,
        "head_bytes": head_bytes,
        "memory_added": (peak_with + head_bytes) / peak_without - 1,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="HF folder")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--prompt", type=int, nargs=2, default=[40, 80], metavar=("MIN", "MAX"))
    parser.add_argument("--response", type=int, nargs=2, default=[10, 50], metavar=("MIN", "MAX"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options, initialize(ParallelConfig()))
    json.dump(found, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
