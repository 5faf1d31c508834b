"""Start a recipe twice on one folder, again and again, and check that one start runs it alone.

    python tools/start_twice.py RECIPE.yaml --out FOLDER --times 20 [--apart SECONDS]

A single run is made first; every pair of starts must end with its metrics and its weights, byte for
byte, one start with code 0 and the other with code 2 and the holder's name (or with code 0 and
nothing to do, where it came when the first was through).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# All of a step's line that two runs may differ in: clocks, and what is measured of the machine.
CLOCKS = ("time/", "train/", "memory/", "checkpoint/", "tokens_per_second")


def start(recipe: Path, folder: Path, overrides: list[str]) -> subprocess.Popen[str]:
    """``megatron-irl train`` on a folder, in a process."""
    command = [sys.executable, "-m", "megatron_irl", "train", str(recipe), *overrides,
               f"output_dir={folder}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def result(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """What a run computed: its steps without what the machine did to them, and its weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]
    return steps, b"".join(p.read_bytes() for p in sorted((folder / "hf").glob("*.safetensors")))


def race(recipe: Path, folder: Path, overrides: list[str], apart: float) -> tuple[str, list[int]]:
    """Start twice; returns what was wrong ("" for nothing), and the exit codes."""
    both = [start(recipe, folder, overrides)]
    time.sleep(apart)
    both.append(start(recipe, folder, overrides))
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    if any("Traceback" in text for text in said):
        return "a traceback", codes
    if sorted(codes) not in ([0, 0], [0, 2]):
        return f"codes {codes}", codes
    refused = [text for code, text in zip(codes, said, strict=True) if code == 2]
    if any("in use by process" not in text for text in refused):
        return "a refusal that does not say who is there", codes
    if codes == [0, 0] and not any("nothing to do" in text for text in said):
        return "both ran", codes
    return "", codes


def main(argv: list[str] | None = None) -> int:
    """Run the tool; 0 if every pair was right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; new")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--apart", type=float, default=0.0, help="seconds between the two starts")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True)
    alone = start(options.recipe, options.out / "alone", options.overrides)
    _, said = alone.communicate()
    if alone.returncode:
        sys.stderr.write(said)
        return alone.returncode
    expected, wrong = result(options.out / "alone"), 0
    for attempt in range(options.times):
        folder = options.out / f"{attempt:03d}"
        problem, codes = race(options.recipe, folder, options.overrides, options.apart)
        if not problem and result(folder) != expected:
            problem = "another result than the single run's"
        wrong += bool(problem)
        sys.stdout.write(f"{attempt + 1}: codes {codes}: {problem or 'right'}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{options.times - wrong} of {options.times} right\n")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
