"""What the training log says about how a method came to its result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from studies.lines import read_lines

SIGNS = {  # a key of metrics.jsonl, and its column
    "logp/demo": "nats of a demonstration",
    "logp/sample": "nats of a frozen sample",
    "reward/accuracy": "pairs told apart",
    "policy/entropy": "entropy a token",
}
PART = 0.1  # of a run's steps, its last ones


def training_signs(folder: Path) -> dict[str, float]:
    """Means over the last tenth of the steps that log them; empty for the start itself.

    Args:
        folder: Of a point.
    """
    log = folder / "run" / "metrics.jsonl"
    lines = read_lines(log) if log.exists() else []
    found = {}
    for key in SIGNS:
        values = [line[key] for line in lines if key in line]
        if values:
            found[key] = float(np.mean(values[-max(1, round(PART * len(values))):]))
    return found


def why_table(results: Mapping[str, Any]) -> str:
    """Markdown: how much greedy decoding adds to samples, diversity, and the training's signs."""
    columns = ["", "method", "greedy minus samples", "different samples", *SIGNS.values(), "AUC"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for level, methods in results["levels"].items():
        for name, entry in methods.items():
            seeds = entry["seeds"]
            gap = np.mean([np.mean(s["greedy"]) - np.mean(s["sampled"]) for s in seeds])
            distinct = np.mean([np.mean(s["distinct"]) for s in seeds])
            cells = [level, name, f"{100 * gap:.1f}", f"{100 * distinct:.1f}"]
            for key in SIGNS:
                cells.append(_mean([s.get("signs", {}).get(key) for s in seeds], 2))
            cells.append(_mean([s.get("auc") for s in seeds], 3))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.{digits}f}" if known else ""
