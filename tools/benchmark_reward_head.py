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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_irl import hardware
from megatron_irl.bench.phases import Bench, pair_objective
from megatron_irl.bench.work import Case, parse_lengths, random_pairs
from megatron_irl.config import ParallelConfig, load_recipe, resolve
from megatron_irl.hardware.stopwatch import Stopwatch
from megatron_irl.model.reward_head import reward_head
from megatron_irl.objectives import reward_loss
from megatron_irl.parallel.topology import Topology, initialize
from megatron_irl.run.inputs import read_headers
from megatron_irl.train.batches import microbatches_for
from megatron_irl.types import HeadOutputs, LossOutput, PackedBatch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LR, HEAD_LR = 1e-6, 1e-4


def with_head(heads: HeadOutputs, batch: PackedBatch) -> LossOutput:
    """The implicit reward's loss, and the explicit one's."""
    implicit = pair_objective(heads.logprobs_R, batch)
    explicit = reward_loss(heads.rewards_S, loss="logistic", bound=None)
    return LossOutput(implicit.total + explicit.total, implicit.weight, implicit.metrics)


def build(options: argparse.Namespace, topology: Topology) -> Bench:
    """A model with a head, its optimizer and the work, as an rft run has them."""
    recipe = load_recipe(BENCHMARKS / "pairs.yaml", [
        f"model.hf={options.model}", f"precision={options.precision}", "algorithm.name=rft",
        f"optimizer.lr={LR}", f"reward.lr={HEAD_LR}",
        f"train.micro_batch_size={options.micro_batch_size}",
        f"train.global_batch_size={options.pairs}",
    ], check_files=False)
    case = Case(resolve(recipe, 1_000_000), *parse_lengths(options.lengths), requests=1,
                steps=options.steps, warmup=1)
    return Bench(case, read_headers(recipe), topology, random_weights=options.random_weights)


def reset_peak() -> None:
    """Start a new peak measurement."""
    hardware.reset_peak_memory()
    hardware.reset_peak_process_memory()


def peak_bytes() -> int:
    """The most memory in use since ``reset_peak``."""
    return hardware.peak_memory() if hardware.IS_CUDA else hardware.peak_process_memory()


def measure(options: argparse.Namespace, topology: Topology) -> dict[str, Any]:
    """Alternate both kinds of step; medians and their ratios."""
    bench = build(options, topology)
    stepper, case = bench.trainer.stepper, bench.case
    steps = {
        "without": partial(stepper.train_step, objective=pair_objective),
        "with": partial(stepper.train_step, objective=with_head, heads="both"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, list[int]] = {name: [] for name in steps}
    for index in range(options.steps + 1):
        pairs = random_pairs(
            bench.arch.vocab_size, options.pairs, case.prompt, case.response, seed=index
        )
        batches = microbatches_for(
            pairs, topology, micro_batch_size=options.micro_batch_size,
            multiple_of=bench.policy.multiple_of,
        )
        # The order alternates too: the second step on a batch finds warm caches.
        for name in sorted(steps, reverse=bool(index % 2)):
            reset_peak()
            with Stopwatch() as watch:
                steps[name](batches)
            if index:  # the first is warm-up
                seconds[name].append(watch.seconds)
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
    parser.add_argument("--lengths", default="40-80,10-50", metavar="PROMPT,RESPONSE")
    parser.add_argument("--random-weights", action="store_true", help="read config.json only")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options, initialize(ParallelConfig()))
    json.dump(found, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
