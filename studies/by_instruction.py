"""A finished study by instruction: ``python -m studies.by_instruction FILE --out DIR``."""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from studies.drafts import Questions
from studies.instructions import INSTRUCTIONS, follows, instruction_of
from studies.lines import read_lines
from studies.study import Study, read_study


def shares(study: Study, results: dict[str, Any], out: Path) -> dict[tuple[str, str, str], float]:
    """Share of accepted answers by method, ``greedy`` or ``sampled``, and instruction, over the
    answers of all seeds."""
    found: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for method in study.methods:
        settings = results["levels"][""][method.name]["settings"]
        for seed in study.seeds:
            folder = out / "points" / study.point("", method, settings, seed).name / "test"
            for kind in ("greedy", "sampled"):
                for line in read_lines(folder / f"{kind}.jsonl"):
                    name = instruction_of(Questions().key(line))
                    found[method.name, kind, name].append(follows(name, line["response"]))
    return {key: float(np.mean(values)) for key, values in found.items()}


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="studies.by_instruction", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    options = parser.parse_args(argv)
    study = read_study(options.study)
    results = json.loads((options.out / f"{study.name}.json").read_text())
    found = shares(study, results, options.out.resolve())
    print("| method | " + " | ".join(f"{n}: greedy, samples, %" for n in INSTRUCTIONS) + " |")
    print("|---" * (1 + len(INSTRUCTIONS)) + "|")
    for method in study.methods:
        cells = [", ".join(f"{100 * found[method.name, kind, name]:.1f}"
                           for kind in ("greedy", "sampled")) for name in INSTRUCTIONS]
        print(f"| {method.name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
