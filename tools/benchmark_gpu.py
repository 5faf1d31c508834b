"""Speed on one GPU of the H100 class: training and generation of well-known shapes, side by side.

    python tools/benchmark_gpu.py [--json FILE] [--only train|generate] [--quick]

Each line is ``megatron-irl benchmark`` on ``benchmarks/pairs.yaml`` and a shape of ``benchmarks/``
with random weights, in a process of its own; the commands are printed, so that one can be run, or
varied, by itself. What is over 10 % slower than ``benchmarks/h100.json`` is warned of.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TRAIN = "--phase train --lengths 256-512,256-512 --steps 6 --warmup 3"
APART = "train.share_prompts=false"  # as the baseline was measured
GENERATE = "--phase generate --steps 3 --warmup 1"
# (shape, the rest of the command); the first of each phase is what ``--quick`` measures.
RUNS = [
    ("llama-1.1b", f"{TRAIN} {APART} train.micro_batch_size=4 train.global_batch_size=16 "
                   "--peer transformers"),
    ("llama-1.1b", f"{TRAIN} {APART} --sweep train.micro_batch_size,train.global_batch_size=4,16"),
    ("llama-1.1b", f"{TRAIN} --sweep train.share_prompts=true,false train.micro_batch_size=16 "
                   "train.global_batch_size=16"),
    ("llama-2.8b", f"{TRAIN} {APART} --sweep precision=bf16,fp8 train.micro_batch_size=8 "
                   "train.global_batch_size=8"),
    ("llama-2.8b", f"{TRAIN} {APART} --sweep precision=bf16,fp8 train.micro_batch_size=8 "
                   "train.global_batch_size=32"),
    ("llama-8b", f"{TRAIN} adapter.rank=64 adapter.targets=[all-linear,lm_head] "
                 "train.micro_batch_size=1 train.micro_batch_tokens=4096 "
                 "train.global_batch_size=16 --sweep train.share_prompts=true,false"),
    ("llama-1.1b", f"{GENERATE} --lengths 256,128 --peer transformers "
                   "--sweep requests,generation.max_requests=64,256"),
    ("llama-1.1b", f"{GENERATE} --lengths 256,128 --sweep generation.cuda_graphs=auto,off"),
    ("llama-1.1b", f"{GENERATE} --lengths 256,64-192 --requests 512 --ragged"),
    ("llama-8b", f"{GENERATE} --lengths 256,128 --requests 64"),
]


def command(shape: str, rest: str) -> list[str]:
    """Of a run."""
    return ["benchmark", str(BENCHMARKS / "pairs.yaml"), f"model.hf={BENCHMARKS / shape}",
            "--random-weights", "--baseline", str(BENCHMARKS / "h100.json"), *shlex.split(rest)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all results here as well")
    parser.add_argument("--only", choices=("train", "generate"))
    parser.add_argument("--quick", action="store_true", help="the first run of each phase only")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    measured: set[str] = set()
    failed = False
    for shape, rest in RUNS:
        phase = rest.split()[1]
        if options.only not in (None, phase) or (options.quick and phase in measured):
            continue
        measured.add(phase)
        print(f"megatron-irl benchmark benchmarks/pairs.yaml model.hf=benchmarks/{shape} "
              f"--random-weights {rest}", flush=True)
        done = subprocess.run([sys.executable, "-m", "megatron_irl", *command(shape, rest)],
                              stdout=subprocess.PIPE, text=True, check=False)
        *table, last = done.stdout.splitlines() or [""]
        if done.returncode:  # the reason is on standard error already
            failed = True
            continue
        print("\n".join(table), flush=True)
        results += json.loads(last)["results"]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
