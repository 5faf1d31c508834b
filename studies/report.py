"""A study's results as a table and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from studies.statistics import paired_difference


def table(results: Mapping[str, Any]) -> str:
    """Markdown: means over seeds and prompts, what each method adds to SFT, and the area under the
    curve of its reward over right and wrong demonstrations."""
    lines = [
        f"### {results['name']}", "", results["hypothesis"].strip(), "",
        "| | method | settings chosen | greedy right | samples right | different samples | "
        "greedy, minus sft [95 %] | p | samples, minus sft [95 %] | p | AUC | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for level, methods in results["levels"].items():
        for name, entry in methods.items():
            lines.append("| " + " | ".join(_cells(level, name, entry, methods.get("sft"))) + " |")
    return "\n".join(lines)


def _cells(
    level: str, name: str, entry: Mapping[str, Any], sft: Mapping[str, Any] | None
) -> list[str]:
    seeds = entry["seeds"]
    means = [f"{100 * np.mean([np.mean(s[key]) for s in seeds]):.1f}"
             for key in ("greedy", "sampled", "distinct")]
    settings = ", ".join(f"{k} {v}" for k, v in entry["settings"].items())
    versus = [""] * 4
    if sft is not None and name not in ("sft", "start"):
        versus = []
        for metric in ("greedy", "sampled"):
            found = paired_difference([s[metric] for s in seeds], [s[metric] for s in sft["seeds"]])
            versus += [f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]",
                       "< 0.0001" if found.p < 1e-4 else f"{found.p:.4f}"]
    areas = [s["auc"] for s in seeds if s.get("auc") is not None]
    auc = f"{np.mean(areas):.3f}" if areas else ""
    seconds = f"{np.mean([s['seconds'] for s in seeds]):.0f}"
    return [level, name, settings, *means, *versus, auc, seconds]


def short_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A head and a row a method: its shares of right answers, and how far they are from SFT's."""
    rows = [["", "method", "greedy right, %", "minus sft [95 %]", "p", "samples right, %",
             "minus sft [95 %]", "p", "reward AUC"]]
    for level, methods in results["levels"].items():
        for name, entry in methods.items():
            cells = _cells(level, name, entry, methods.get("sft"))
            _, _, _, greedy, sampled, _, gain, p, gain_sampled, p_sampled, auc, _ = cells
            rows.append([level, name, greedy, gain, p, sampled, gain_sampled, p_sampled, auc])
    return rows


def short_table(results: Mapping[str, Any]) -> str:
    """``short_rows`` as Markdown, in columns for a terminal."""
    rows = short_rows(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def picture(results: Mapping[str, Any], path: Path) -> None:
    """Bars a method and level, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    levels = list(results["levels"])
    names = list(results["levels"][levels[0]])
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(levels) + 0.4 * len(names), 3.6))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        place = np.arange(len(levels)) + (number - (len(names) - 1) / 2) * width
        seeds = np.array([[100 * np.mean(s[results["metric"]])
                           for s in results["levels"][level][name]["seeds"]] for level in levels])
        axes.bar(place, seeds.mean(1), width, label=name, alpha=0.7)
        axes.plot(np.repeat(place[:, None], seeds.shape[1], 1), seeds, "k.", markersize=3)
    axes.set_xticks(np.arange(len(levels)), [level or results["name"] for level in levels])
    axes.set_ylabel(f"{results['metric']} right, % of test prompts")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
