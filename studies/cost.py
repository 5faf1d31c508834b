"""What training by each method costs, in seconds of the processor, measured in turn.

On a machine that is shared, time by the clock is noise; what the process itself computed is less of
it, and methods that take turns see the same neighbours. Two or more methods of kind sft that
differ in ``steps`` give the cost of a step of sft and of what a run costs besides, and so how many
steps of sft take as long as a method.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from studies.points import train_point
from studies.study import Study


def cost_table(study: Study, out: Path, repeats: int) -> str:
    """Markdown: median and range of each method, over ``repeats`` after one that warms up.

    Every method has the first of its settings; runs go to ``out/cost`` and are kept.
    """
    level = next(iter(study.levels))
    seconds: dict[str, list[float]] = {method.name: [] for method in study.methods}
    steps: dict[str, int] = {}
    for turn in range(repeats + 1):
        for method in study.methods:
            settings = method.trials()[0]
            point = study.point(level, method, settings, study.trial_seed)
            home = out / "cost" / str(turn) / point.name
            train_point(point, out, home)
            if method.kind == "sft":
                steps[method.name] = settings["steps"]
            if turn:
                said = json.loads((home / "seconds.json").read_text())
                seconds[method.name].append(said["processor_seconds"])
    return "\n".join(_lines(seconds, steps))


def _lines(seconds: Mapping[str, Sequence[float]], steps: Mapping[str, int]) -> list[str]:
    lines = ["| method | processor seconds, median [range] | steps of sft that take as long |",
             "|---|---|---|"]
    for name, values in seconds.items():
        equal = equal_steps(float(np.median(values)), seconds, steps)
        lines.append(f"| {name} | {np.median(values):.1f} [{min(values):.1f}, {max(values):.1f}] "
                     f"| {equal:.0f} |")
    return lines


def equal_steps(
    cost: float, seconds: Mapping[str, Sequence[float]], steps: Mapping[str, int]
) -> float:
    """Steps of sft that take ``cost`` seconds, on the straight line through the medians of sft."""
    slope, fixed = np.polyfit(list(steps.values()),
                              [float(np.median(seconds[name])) for name in steps], 1)
    return (cost - fixed) / slope
