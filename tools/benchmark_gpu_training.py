"""Tokens a second and model FLOPs utilisation of IRFT's optimizer step on one GPU.

    python tools/benchmark_gpu_training.py --model 1.1B --pairs 4 16 [--precision fp8]
    python tools/benchmark_gpu_training.py --model 8B --lora 64 --micro-batch-tokens 4096

Random weights; prompts and responses of 256 to 512 random tokens; every step draws new pairs, packs
them, and takes ``--microbatches`` microbatches and one AdamW step through the code that trains.
With ``--micro-batch-tokens`` the step's pairs are packed by tokens instead. Under ``--lora`` a
frozen weight's own gradient is not counted as work: 4 FLOPs a weight and token, not 6.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_shapes import (
    PEAK_FLOPS,
    SHAPES,
    adapter_parameters,
    build_random,
    build_transformers,
    random_pairs,
    shape,
    training_flops,
)

from megatron_irl import hardware
from megatron_irl.adapters.adapters import add_adapters
from megatron_irl.adapters.spec import adapter_spec
from megatron_irl.collector import settled
from megatron_irl.config import AdapterConfig, ParallelConfig, Precision
from megatron_irl.model.build import build_ddp_config
from megatron_irl.objectives import irft_loss, sequence_logprobs
from megatron_irl.parallel.topology import Topology, initialize, shutdown
from megatron_irl.policy.policy import Policy
from megatron_irl.train.batches import microbatches_for, num_tokens
from megatron_irl.train.optimizer import build_megatron_optimizer
from megatron_irl.train.step import Stepper

from megatron.core.optimizer import OptimizerConfig  # isort: skip

BETA, LR = 0.1, 1e-6


def objective(logprobs_R: torch.Tensor, batch: Any) -> Any:
    logps_S = sequence_logprobs(logprobs_R, batch.segment_R, batch.num_sequences)
    return irft_loss(logps_S, batch.ref_logps_S, batch.lengths_S, beta=BETA)


def build_stepper(
    model: str, precision: Precision, topology: Topology, *, lora: int | None = None,
    optimizer: dict[str, Any] | None = None, **overrides: Any,
) -> Stepper:
    """The product's step over random weights.

    Args:
        lora: Rank of adapters on every linear layer and the head.
        optimizer: Further fields of Megatron's OptimizerConfig.
    """
    chunks, config = build_random(model, precision, topology, **overrides)
    arch, adapters = shape(model), None
    if lora is not None:
        wanted = AdapterConfig(rank=lora, targets=("all-linear", "lm_head"))
        spec = adapter_spec(wanted, arch, ParallelConfig(), seed=0)
        assert spec is not None
        adapters = add_adapters(chunks, spec, arch, topology)
    policy = Policy(chunks, topology, arch, adapters=adapters).for_training(build_ddp_config())
    options = {
        "lr": LR, "weight_decay": 0.0, "use_distributed_optimizer": True, "bf16": config.bf16,
        "params_dtype": config.params_dtype,
    }
    megatron = build_megatron_optimizer(
        OptimizerConfig(**options | (optimizer or {})), policy.chunks, topology
    )
    return Stepper(policy, megatron)


def measure(
    stepper: Stepper, model: str, *, pairs: int, microbatches: int,
    steps: int = 6, warmup: int = 3, micro_batch_tokens: int | None = None,
) -> dict[str, float]:
    """Medians over a few steps."""
    arch, rates = shape(model), []
    adapters = stepper.policy.adapters
    flops_of = partial(training_flops, arch) if adapters is None else partial(
        training_flops, arch, adapters=adapter_parameters(adapters)
    )
    hardware.reset_peak_memory()
    for step in range(-warmup, steps):
        batch = random_pairs(arch, pairs * microbatches, seed=step + warmup)
        hardware.synchronize()
        start = time.perf_counter()
        packed = microbatches_for(
            batch, stepper.policy.topology, micro_batch_size=pairs,
            micro_batch_tokens=micro_batch_tokens,
            multiple_of=stepper.policy.multiple_of,
        )
        stepper.train_step(packed, objective)
        hardware.synchronize()
        seconds = time.perf_counter() - start
        if step >= 0:
            rates.append((seconds, sum(map(num_tokens, batch)) / seconds,
                          flops_of(batch) / seconds))
    seconds, tokens, flops = (statistics.median(column) for column in zip(*rates, strict=True))
    return {"ms_per_step": 1e3 * seconds, "tokens_per_second": tokens,
            "tflops": flops / 1e12, "mfu": flops / PEAK_FLOPS,
            "peak_gib": hardware.peak_memory() / 2**30}


def measure_transformers(model: str, *, pairs: int, steps: int = 4) -> dict[str, float]:
    """The usual pairwise trainer: padded microbatch, whole logits, fused AdamW on bf16 weights."""
    theirs = build_transformers(model)
    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0.0, fused=True)
    arch, rates = shape(model), []
    hardware.reset_peak_memory()
    for step in range(steps + 2):
        batch = random_pairs(arch, pairs, seed=step)
        hardware.synchronize()
        start = time.perf_counter()
        optimizer.zero_grad()
        _their_loss(theirs, batch).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        hardware.synchronize()
        if step >= 2:
            seconds = time.perf_counter() - start
            rates.append((sum(map(num_tokens, batch)) / seconds,
                          training_flops(arch, batch) / seconds))
    tokens, flops = (statistics.median(column) for column in zip(*rates, strict=True))
    return {"tokens_per_second": tokens, "tflops": flops / 1e12, "mfu": flops / PEAK_FLOPS,
            "peak_gib": hardware.peak_memory() / 2**30}


def _their_loss(model: Any, batch: list[Any]) -> torch.Tensor:
    sequences = [(p.prompt_ids, ids) for p in batch for ids in (p.demo_ids, p.sample_ids)]
    longest = max(len(prompt) + len(ids) for prompt, ids in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
    attention, counted = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, (prompt, ids) in enumerate(sequences):
        end = len(prompt) + len(ids)
        tokens[row, :end] = torch.cat([torch.from_numpy(prompt), torch.from_numpy(ids)])
        attention[row, :end] = 1
        counted[row, len(prompt) : end] = 1
    tokens, attention, counted = (t.to(hardware.device()) for t in (tokens, attention, counted))
    logits = model(input_ids=tokens, attention_mask=attention).logits[:, :-1].float()
    logprobs = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    logps = (logprobs * counted[:, 1:]).sum(-1)
    return -torch.nn.functional.logsigmoid(BETA * (logps[0::2] - logps[1::2])).sum() / len(batch)


def lines(options: argparse.Namespace, topology: Topology) -> Iterator[dict[str, Any]]:
    """One result per number of pairs."""
    stepper = build_stepper(
        options.model, options.precision, topology, lora=options.lora,
        optimizer=json.loads(options.optimizer), **json.loads(options.model_keys),
    )
    for pairs in options.pairs:
        with settled():  # as in a run
            numbers = measure(
                stepper, options.model, pairs=pairs, microbatches=options.microbatches,
                steps=options.steps, micro_batch_tokens=options.micro_batch_tokens,
            )
        packed = {"pairs": pairs, "microbatches": options.microbatches}
        if options.micro_batch_tokens:
            packed = {"pairs_per_step": pairs * options.microbatches,
                      "micro_batch_tokens": options.micro_batch_tokens}
        yield {"what": "training", "model": options.model, "precision": options.precision,
               "lora": options.lora} | packed | _rounded(numbers)
    del stepper
    hardware.release_cached_memory()
    if options.transformers:
        numbers = measure_transformers(options.model, pairs=options.pairs[0])
        yield {"what": "training, transformers", "model": options.model, "precision": "bf16",
               "pairs": options.pairs[0], "microbatches": 1} | _rounded(numbers)


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(SHAPES), default="1.1B")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--pairs", type=int, nargs="+", default=None, help="a microbatch; 4 and 16")
    parser.add_argument("--microbatches", type=int, default=4, help="an optimizer step")
    parser.add_argument("--micro-batch-tokens", type=int, help="pack a step's pairs by tokens")
    parser.add_argument("--lora", type=int, metavar="RANK", help="adapters, the model frozen")
    parser.add_argument("--optimizer", default="{}", help="JSON of Megatron OptimizerConfig fields")
    parser.add_argument("--model-keys", default="{}", help="JSON of a recipe's model: keys")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--transformers", action="store_true", help="measure transformers as well")
    options = parser.parse_args()
    options.pairs = options.pairs or ([4] if options.micro_batch_tokens else [4, 16])
    topology = initialize(ParallelConfig())
    for line in lines(options, topology):
        print(json.dumps(line), flush=True)
    shutdown()


if __name__ == "__main__":
    main()
