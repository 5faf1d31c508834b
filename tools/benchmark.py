"""Speed and memory of a round beside other trainers on this machine: ``make benchmark``.

    python tools/benchmark.py [--model data/SmolLM2-135M-Instruct] [--peer trl] [--precision fp32]

``megatron-irl benchmark`` on SmolLM2, with short prompts and responses: generation, reference pass
and optimizer step, each side in a process of its own on the same pairs and threads. A ratio above 1
means that megatron_irl is faster; a memory ratio below 1, that it takes less. On a CPU without
instructions for bf16 products, where both sides are many times slower than in fp32, bf16 is
measured only if asked for.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ["--lengths", "40-80,32-64", "--requests", "32", "--steps", "3", "--warmup", "1"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("data/SmolLM2-135M-Instruct"),
                        help="HF folder; made from the PyPI package where it is missing")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"],
                        help="default: fp32, and bf16 where the CPU has instructions for it")
    parser.add_argument("--peer", choices=["transformers", "trl"], default="transformers")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    from megatron_irl import hardware

    if not (options.model / "config.json").exists():
        make = [sys.executable, str(ROOT / "tools" / "make_smollm2.py"), "--out"]
        subprocess.run([*make, str(options.model)], check=True)
    both = hardware.has_fast_bf16()
    for precision in options.precision or (["fp32", "bf16"] if both else ["fp32"]):
        print(precision, flush=True)
        command = [sys.executable, "-m", "megatron_irl", "benchmark",
                   str(ROOT / "benchmarks" / "pairs.yaml"), f"model.hf={options.model.resolve()}",
                   *WORK, "--peer", options.peer, f"precision={precision}"]
        subprocess.run(command, check=True,
                       env=os.environ | {"OMP_NUM_THREADS": str(options.threads)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
