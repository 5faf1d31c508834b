"""Time an IRFT optimizer step against plain transformers on the same pairs, side by side.

    python tools/benchmark_training.py --model data/SmolLM2-135M-Instruct --precision fp32 bf16

Both do the policy's forward and backward over the same (demonstration, sample) pairs with cached
reference log-probabilities, clip, and take an AdamW step, in the same microbatches with the same
threads. The transformers side is the usual pairwise trainer: right-padded microbatch, logits of all
positions, fp32 log-softmax, gather, masked sum. Steps alternate, and the ratio is of medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_irl.config import ParallelConfig, Precision
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.model.build import build_chunks, build_config, build_ddp_config
from megatron_irl.objectives import irft_loss, sequence_logprobs
from megatron_irl.parallel.topology import Topology, initialize
from megatron_irl.policy.policy import Policy
from megatron_irl.train.batches import microbatches_for
from megatron_irl.train.optimizer import build_megatron_optimizer
from megatron_irl.train.step import Stepper
from megatron_irl.types import Pair

from megatron.core.optimizer import OptimizerConfig  # isort: skip

BETA, LR = 0.1, 1e-6


def make_pairs(count: int, vocab: int, seed: int, prompt: tuple[int, int],
               response: tuple[int, int]) -> list[Pair]:
    """Random pairs with lengths uniform in the given ranges."""
    rng = np.random.default_rng(seed)

    def ids(bounds: tuple[int, int]) -> np.ndarray:
        return rng.integers(3, vocab, rng.integers(bounds[0], bounds[1] + 1)).astype(np.int32)

    return [
        Pair(i, ids(prompt), ids(response), ids(response), np.zeros(1, np.float32), "stop",
             ref_demo_logp=-50.0, ref_sample_logp=-50.0)
        for i in range(count)
    ]


def build_ours(model: Path, precision: Precision, topology: Topology, rows_at_once: int) -> Stepper:
    """The product's step on the real weights."""
    arch = architecture(read_hf_config(model))
    config = build_config(arch, ParallelConfig(), precision=precision)
    policy = Policy(build_chunks(config, arch, topology), topology, arch, rows_at_once=rows_at_once)
    policy.load_weights(model)
    policy = policy.for_training(build_ddp_config())
    optimizer = build_megatron_optimizer(
        OptimizerConfig(lr=LR, weight_decay=0.0, use_distributed_optimizer=True, bf16=config.bf16,
                        params_dtype=config.params_dtype),
        policy.chunks, topology,
    )
    return Stepper(policy, optimizer)


class Theirs:
    """The same step in plain transformers."""

    def __init__(self, model: Path, precision: str) -> None:
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.optimizer = torch.optim.AdamW(  # fused, as transformers' Trainer has it
            self.model.parameters(), lr=LR, weight_decay=0.0, fused=True
        )

    def step(self, microbatches: list[list[Pair]]) -> float:
        num_pairs = sum(map(len, microbatches))
        self.optimizer.zero_grad()
        total = 0.0
        for pairs in microbatches:
            loss = self._loss(pairs) / num_pairs
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return total

    def _loss(self, pairs: list[Pair]) -> torch.Tensor:
        sequences = [(p.prompt_ids, ids) for p in pairs for ids in (p.demo_ids, p.sample_ids)]
        longest = max(len(prompt) + len(ids) for prompt, ids in sequences)
        tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
        attention, counted = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for row, (prompt, ids) in enumerate(sequences):
            end = len(prompt) + len(ids)
            tokens[row, :end] = torch.from_numpy(np.concatenate([prompt, ids]))
            attention[row, :end] = 1
            counted[row, len(prompt) : end] = 1
        logits = self.model(input_ids=tokens, attention_mask=attention).logits[:, :-1].float()
        logprobs = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        logps = (logprobs * counted[:, 1:]).sum(-1)
        reference = torch.tensor([r for p in pairs for r in (p.ref_demo_logp, p.ref_sample_logp)])
        ratios = logps - reference
        return -torch.nn.functional.logsigmoid(BETA * (ratios[0::2] - ratios[1::2])).sum()


def objective(logprobs_R: torch.Tensor, batch: Any) -> Any:
    logps_S = sequence_logprobs(logprobs_R, batch.segment_R, batch.num_sequences)
    return irft_loss(logps_S, batch.ref_logps_S, batch.lengths_S, beta=BETA)


def compare(
    options: argparse.Namespace, precision: Precision, topology: Topology
) -> dict[str, Any]:
    """Alternate steps of both; returns the medians and their ratio."""
    ours = build_ours(options.model, precision, topology, options.logprob_rows)
    theirs = Theirs(options.model, precision)
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    losses: tuple[float, float] = (0.0, 0.0)
    for step in range(options.steps + 1):
        pairs = make_pairs(options.pairs, 49152, options.seed + step, tuple(options.prompt),
                           tuple(options.response))
        order = sorted(pairs, key=lambda p: len(p.prompt_ids) + len(p.demo_ids))
        size = options.micro_batch_size
        theirs_batches = [order[i : i + size] for i in range(0, len(order), size)]
        start = time.perf_counter()
        batches = microbatches_for(pairs, topology, micro_batch_size=size, multiple_of=1)
        ours_loss = ours.train_step(batches, objective).loss
        middle = time.perf_counter()
        theirs_loss = theirs.step(theirs_batches)
        if step == 0:  # warm-up; the losses of the untouched weights must agree
            losses = (ours_loss, theirs_loss)
            continue
        seconds["ours"].append(middle - start)
        seconds["transformers"].append(time.perf_counter() - middle)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "precision": precision, "threads": torch.get_num_threads(),
        "first_loss_ours": losses[0], "first_loss_transformers": losses[1],
        "ours_seconds": medians["ours"], "transformers_seconds": medians["transformers"],
        "ratio": medians["transformers"] / medians["ours"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="HF folder")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"],
                        default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--prompt", type=int, nargs=2, default=[40, 80], metavar=("MIN", "MAX"))
    parser.add_argument("--response", type=int, nargs=2, default=[10, 50], metavar=("MIN", "MAX"))
    parser.add_argument("--logprob-rows", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    topology = initialize(ParallelConfig())
    for precision in options.precision:
        print(json.dumps(compare(options, precision, topology)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
