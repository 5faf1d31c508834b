"""Speed on one GPU of the H100 class: training and generation of well-known shapes, side by side.

    python tools/benchmark_gpu.py [--json FILE] [--only training|generation] [--quick]

Runs ``benchmark_gpu_training.py`` and ``benchmark_decoding.py``, each in a process of its own so
that the memory of one is free for the next, and prints their results as one table. Takes about six
minutes; random weights, no folder is written or read.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
TRAINING = [
    ("--model", "1.1B", "--pairs", "4", "16", "--transformers"),
    ("--model", "8B/4", "--pairs", "8"),
    ("--model", "8B/4", "--pairs", "8", "--precision", "fp8"),
    ("--model", "8B", "--lora", "64", "--micro-batch-tokens", "4096"),
]
GENERATION = [
    ("--shape", "1.1B", "--requests", "64", "256", "--peer", "--ragged"),
    ("--shape", "8B", "--requests", "64"),
]
COLUMNS = ("tokens_per_second", "tflops", "mfu", "peak_gib", "ms_per_step", "times_transformers",
           "bandwidth_share")


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A result per measurement; a script that fails gives one line that says so."""
    plans = [("training", "benchmark_gpu_training.py", TRAINING),
             ("generation", "benchmark_decoding.py", GENERATION)]
    for what, script, runs in plans:
        if options.only not in (None, what):
            continue
        for arguments in runs[: 1 if options.quick else None]:
            command = [sys.executable, str(TOOLS / script), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            for line in done.stdout.splitlines():
                if line.startswith("{"):
                    yield {"what": what} | json.loads(line)
            if done.returncode:
                said = done.stderr.strip().splitlines()[-1:]
                yield {"what": what, "failed": " ".join(arguments), "error": "".join(said)}


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    if "failed" in result:
        return f"{result['what']} {result['failed']}: FAILED: {result['error']}"
    name = result.get("model") or result.get("shape")
    tokens = result.get("micro_batch_tokens")
    size = (f"LoRA r={result['lora']}, {tokens} tokens" if tokens else
            f"{result['pairs']} pairs x {result['microbatches']}" if "pairs" in result
            else f"{result.get('requests') or result.get('places')} requests")
    label = f"{result['what']} {name} {result.get('precision', 'bf16')}, {size}"
    cells = [f"{key} {result[key]}" for key in COLUMNS if key in result]
    return f"{label:52}" + "  ".join(cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--only", choices=("training", "generation"))
    parser.add_argument("--quick", action="store_true", help="the smaller model only")
    options = parser.parse_args()
    found = []
    for result in results(options):
        found.append(result)
        print(row(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return int(any("failed" in result for result in found))


if __name__ == "__main__":
    sys.exit(main())
