"""Generation speed beside ``transformers.generate``: same weights, dtype, prompts and threads.

    python tools/benchmark_generation.py --hf DIR [--ragged] [--precision bf16] [--threads 2]

Both sides sample from the plain policy (temperature 1, no filters) and produce exactly the tokens
asked for. With ``--ragged`` prompt lengths and response lengths vary; transformers then pads the
prompts on the left and runs until its longest response is done, as any static batch must. The
sides take turns, and each side's best run counts, so that a busy machine disturbs both alike.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.load import load_hf_weights
from megatron_irl.generation import SamplingConfig
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.parallel.topology import initialize, shutdown

Side = Callable[[], None]


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    prompts, budgets = make_work(options)
    sides = {
        "megatron_irl": ours(options, prompts, budgets),
        "transformers": theirs(options, prompts, budgets),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    speed = {name: round(sum(budgets) / min(times), 1) for name, times in seconds.items()}
    report = {
        "requests": len(prompts), "tokens": sum(budgets), "ragged": options.ragged,
        "precision": options.precision, "threads": options.threads, "tokens_per_second": speed,
        "ratio": round(speed["megatron_irl"] / speed["transformers"], 3),
        "seconds": {name: [round(t, 2) for t in times] for name, times in seconds.items()},
    }
    print(json.dumps(report))
    shutdown()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hf", type=Path, required=True, help="HF folder")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="mean, if ragged")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest, if ragged")
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def make_work(options: argparse.Namespace) -> tuple[list[np.ndarray], list[int]]:
    """Random prompts, and how many tokens to generate for each."""
    rng = np.random.default_rng(0)
    vocab = architecture(read_hf_config(options.hf)).vocab_size
    lengths = np.full(options.requests, options.prompt_tokens)
    budgets = np.full(options.requests, options.new_tokens)
    if options.ragged:
        half = options.prompt_tokens // 2
        lengths = rng.integers(half, 3 * half + 1, options.requests)
        budgets = rng.integers(options.new_tokens // 8, options.new_tokens + 1, options.requests)
        budgets[0] = options.new_tokens
    return [rng.integers(0, vocab, n).astype(np.int32) for n in lengths], budgets.tolist()


def ours(options: argparse.Namespace, prompts: list[np.ndarray], budgets: list[int]) -> Side:
    parallel = ParallelConfig()
    topology = initialize(parallel)
    arch = architecture(read_hf_config(options.hf))
    config = build_config(arch, parallel, precision=options.precision)
    chunks = build_chunks(config, arch, topology)
    load_hf_weights(chunks, arch, options.hf, tp_rank=0, tp_size=1)

    def run() -> None:
        with MegatronGenerator(
            chunks, topology, max_sequence_length=max(map(len, prompts)) + options.new_tokens,
            vocab_size=arch.vocab_size, max_requests=len(prompts),
        ) as generator:
            samples = generator.generate(
                prompts, SamplingConfig(eos_id=arch.vocab_size), max_new_tokens=budgets
            )
        assert [len(s.token_ids) for s in samples] == budgets

    return run


def theirs(options: argparse.Namespace, prompts: list[np.ndarray], budgets: list[int]) -> Side:
    from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteriaList

    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(options.hf, dtype=dtype).eval()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=options.new_tokens,
        eos_token_id=None, pad_token_id=0,
    )
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    ends = longest + torch.tensor(budgets)

    def done(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        del scores
        return input_ids.shape[1] >= ends

    def run() -> None:
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([done]))

    return run


if __name__ == "__main__":
    main()
