"""SmolLM2 trained whole and through adapters, side by side: memory, time, disk, result.

    python tools/compare_lora.py --out runs/compare_lora [--steps 16] [--rank 16]

Number sorting of ``examples/smollm2_irft``, one process, one recipe each: sft of the whole model,
and of adapters at ten times its learning rate; then a round of irft by each from its own result,
whose samples are drawn from merged weights and, once more, with the adapters applied. Prints a line
of JSON a run, and a table. Peak memory is the process's resident set. Started again on the same
``--out``, it goes on with the runs that are not finished.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "smollm2_irft"
LR = 1e-4
COLUMNS = ("run", "peak_gib", "seconds_per_step", "checkpoint_mib", "sample_tokens_per_second",
           "nll_before", "nll", "exact_match")


def measured(recipe: str, folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Train a recipe in a process of its own, and what it took."""
    kept = folder.with_suffix(".json")
    if kept.exists():
        print(kept.read_text(), flush=True)
        return json.loads(kept.read_text())
    shutil.rmtree(folder, ignore_errors=True)  # a part of a run is no measurement
    overrides = [f"{key}={value}" for key, value in (keys | {"output_dir": folder}).items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_irl", "train", str(EXAMPLE / recipe), *overrides], cwd=ROOT
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{folder} ended with status {status}")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    saved = max((folder / "checkpoints").glob("step_*"))
    before, after = rounds[0]["evaluation_before"], rounds[-1]["evaluation"]
    found = {
        "run": folder.name, "peak_gib": usage.ru_maxrss / 2**20,
        "seconds_per_step": statistics.median(s["time/step"] for s in steps[1:]),
        "checkpoint_mib": sum(p.stat().st_size for p in saved.rglob("*")) / 2**20,
        "sample_tokens_per_second": rounds[0].get("generation", {}).get("tokens_per_second"),
        "nll_before": before.get("nll"), "nll": after.get("nll"),
        "exact_match": after.get("greedy_exact_match"),
    }
    kept.write_text(json.dumps(found))
    print(kept.read_text(), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for model, data and runs")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of sft")
    parser.add_argument("--prompts", type=int, default=32, help="of the round of irft")
    parser.add_argument("--responses", type=int, default=100, help="held-out ones that are drawn")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    out = options.out.resolve()
    model, data = out / "SmolLM2-135M-Instruct", out / "data"
    if not (model / "config.json").exists():
        make = [sys.executable, str(ROOT / "tools" / "make_smollm2.py"), "--out", str(model)]
        subprocess.run(make, check=True, cwd=ROOT)
    if not (data / "eval.jsonl").exists():
        subprocess.run([sys.executable, str(EXAMPLE / "make_data.py"), "--out", str(data)],
                       check=True, cwd=ROOT)
    common = {
        "data.train": data / "train.jsonl", "data.eval": data / "eval.jsonl",
        "parallel.data_parallel_size": 1, "precision": options.precision,
        "logging.tensorboard": "false", "evaluation.limit": options.responses,
        "evaluation.samples": "false",
    }
    sft = common | {"model.hf": model, "algorithm.steps_per_round": options.steps}
    irft = common | {"algorithm.rounds": 1, "algorithm.prompts_per_round": options.prompts}
    lora = {"adapter.rank": options.rank, "adapter.alpha": 2 * options.rank}
    results = [
        measured("sft.yaml", out / "sft_full", sft | {"optimizer.lr": LR}),
        measured("sft.yaml", out / "sft_lora", sft | lora | {"optimizer.lr": 10 * LR}),
        measured("irft.yaml", out / "irft_full", irft | {
            "model.hf": out / "sft_full" / "hf", "optimizer.lr": 0.3 * LR}),
    ]
    going_on = irft | {"model.hf": model, "adapter.path": out / "sft_lora" / "adapter",
                       "optimizer.lr": 3 * LR}
    results += [
        measured("irft.yaml", out / f"irft_lora_{how}", going_on | {"adapter.generation": how})
        for how in ("merged", "applied")
    ]
    sys.stdout.write(table(results))
    return 0


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|-" * len(COLUMNS) + "|"]
    for result in results:
        cells = [f"{v:.3g}" if isinstance(v := result[name], float) else str(v or "")
                 for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
