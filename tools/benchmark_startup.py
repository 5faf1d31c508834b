"""Start-up time and memory against the number of demonstrations, through the real command.

    python tools/benchmark_startup.py [--records 100 1000000] [--ranks 1 4]

Every cell is two starts of ``megatron-irl train`` on the toy of ``examples/rft_cpu`` with short
chat records: the first on a new folder (one optimizer step, then it is killed while it stands), the
second on the same folder. Time is from the start of the command to the first line of
``metrics.jsonl`` and, the second time, to the word that it resumes or is finished; memory is the
largest proportional set (shared pages divided among their users) that one process of the run had.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.2
LETTERS = "abcdefgh"


def write_records(path: Path, count: int) -> None:
    """``count`` demonstrations of a word and its reverse; words repeat, records do not matter."""
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            word = "".join(rng.choices(LETTERS, k=rng.randint(3, 5)))
            turns = [{"role": "user", "content": word},
                     {"role": "assistant", "content": word[::-1]}]
            file.write(json.dumps({"messages": turns}) + "\n")


def run(folder: Path, data: Path, ranks: int, steps: int) -> dict[str, float]:
    """Seconds to the first step of this start, seconds in all, and the largest process in MiB."""
    metrics = folder / "run" / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    command = [
        sys.executable, "-m", "megatron_irl", "train", str(ROOT / "examples/rft_cpu/sft.yaml"),
        f"model.hf={folder / 'toy' / 'model'}", f"data.train={data}", "data.eval=[]",
        f"output_dir={folder / 'run'}", f"parallel.data_parallel_size={ranks}",
        f"algorithm.steps_per_round={steps}", "algorithm.rounds=2", "checkpoint.interval=1",
        "evaluation.interval=never", "logging.tensorboard=false", "train.global_batch_size=8",
        "train.micro_batch_size=2", "precision=fp32",
    ]
    start, first, peak = time.monotonic(), 0.0, 0.0
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            if not first and metrics.exists() and metrics.stat().st_size > before:
                first = time.monotonic() - start
            peak = max(peak, largest(tree))
            if first and before == 0:  # the next start is to find this one in the middle
                process.terminate()
                break
            time.sleep(POLL_SECONDS)
        process.wait(timeout=60)
    if not first:
        raise SystemExit(f"the run made no step:\n{log.read_text()[-2000:]}")
    return {"first_step": first, "seconds": time.monotonic() - start, "peak_mib": peak / 2**20}


def largest(tree: psutil.Process) -> float:
    """Bytes of the largest process of a tree, shared pages divided among their users."""
    sizes = [0.0]
    try:
        for process in [tree, *tree.children(recursive=True)]:
            sizes.append(float(process.memory_full_info().pss))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass  # it ended between the listing and the look
    return max(sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, nargs="+", default=[100, 1_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    print(f"{'records':>9}{'ranks':>6}{'start':>8}{'first step, s':>15}{'largest, MiB':>14}")
    for count in options.records:
        for ranks in options.ranks:
            with tempfile.TemporaryDirectory(prefix="startup") as name:
                folder = Path(name)
                make = [sys.executable, str(ROOT / "examples/rft_cpu/make_toy.py"), "--out",
                        str(folder / "toy")]
                subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
                data = folder / "train.jsonl"
                write_records(data, count)
                for start in ("first", "second"):
                    found = run(folder, data, ranks, steps=4)
                    print(f"{count:9}{ranks:6}{start:>8}{found['first_step']:15.1f}"
                          f"{found['peak_mib']:14.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
