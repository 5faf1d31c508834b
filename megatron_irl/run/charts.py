"""The report's charts: one small inline SVG each.

Text and axes take the page's own colour, so that a chart reads on a light and on a dark page.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_irl.evaluation.intervals import wilson_interval
from megatron_irl.run.comparison import share_of

Record = Mapping[str, Any]

DEMO, SAMPLE, MARGIN, OTHER, EXTRA = "#3f83d6", "#dd7a2b", "#8e63ce", "#2f9e77", "#c2508f"
_INK = "#010203"  # replaced by currentColor
_MAX_POINTS = 500
_STYLE: dict[Any, Any] = {  # matplotlib types the keys as literals
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK,
    "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "lines.linewidth": 1.4,
}
_SIZE = (4.4, 2.5)


@dataclass(frozen=True)
class Chart:
    """A titled SVG element, ready for the page."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Curves:
    """What a chart over optimizer steps shows: (metric key, legend, colour) per line."""

    title: str
    ylabel: str
    lines: tuple[tuple[str, str, str], ...]
    log: bool = False
    note: str = ""


_REWARDS = (("reward/demo", "demonstration", DEMO), ("reward/sample", "sample", SAMPLE),
            ("reward/margin", "margin", MARGIN))
_COMMON_CHARTS = (
    Curves("Reward accuracy", "share of pairs", (
        ("reward/accuracy", "accuracy", MARGIN), ("preference/accuracy", "preferences", EXTRA))),
    Curves("Log-probability", "nats per response", (
        ("logp/demo", "demonstration", DEMO), ("logp/sample", "sample", SAMPLE))),
    Curves("Response length", "tokens", (
        ("length/demo", "demonstration", DEMO), ("length/sample", "sample", SAMPLE))),
    Curves("Gradient norm", "before clipping", (("grad_norm", "gradient norm", OTHER),), log=True),
    Curves("Learning rate", "", (("lr", "learning rate", OTHER),)),
    Curves("Utilisation", "share of BF16's peak", (("train/mfu", "MFU", OTHER),),
           note="Of the model's own FLOPs: response rows only, nothing padded."),
    Curves("Arithmetic", "TFLOP/s a device", (
        ("train/tflops", "counted", OTHER), ("train/tflops_padded", "as padded", SAMPLE)),
           note="As padded: what a trainer would show that pads every sequence and computes the "
                "head on all tokens."),
    Curves("Training speed", "tokens/s", (("tokens_per_second", "tokens/s", OTHER),),
           note="Optimizer steps only, prompts included."),
    Curves("Peak memory", "GiB a device", (
        ("memory/peak_allocated", "tensors", DEMO), ("memory/peak_reserved", "allocator", SAMPLE),
        ("memory/peak_process", "process", OTHER)),
           note="The main rank's; on a CPU the most that its process has had."),
)
STEP_CHARTS = (
    Curves("Loss", "per pair (irft) or token (sft)", (
        ("loss", "loss", OTHER), ("loss/margin", "margin loss", MARGIN))),
    Curves("Implicit rewards", "β · log(π / π_ref)", _REWARDS),
    *_COMMON_CHARTS,
)
EXPLICIT_CHARTS = (
    Curves("Loss", "per pair", (
        ("reward/loss", "reward loss", OTHER), ("loss/reward", "margin loss", MARGIN)),
           note="Of the reward steps."),
    Curves("Rewards", "of the head", _REWARDS),
    Curves("Policy loss", "per sample", (("policy/loss", "policy loss", OTHER),)),
    Curves("Clipped tokens", "share", (("policy/clip_fraction", "clipped", SAMPLE),)),
    Curves("Entropy", "nats per token", (("policy/entropy", "entropy", OTHER),)),
    Curves("Distance from the sampler", "KL, nats per token", (
        ("policy/kl_to_sampler", "KL", MARGIN),)),
    Curves("Distance from the reference", "log π / π_ref, nats per sample", (
        ("policy/log_ratio_to_reference", "log-ratio", MARGIN),)),
    *_COMMON_CHARTS,
)


def step_charts(
    metrics: Sequence[Record], *, ln2_line: bool, explicit_reward: bool = False
) -> list[Chart]:
    """Return a chart for each of ``STEP_CHARTS`` that has data.

    Args:
        metrics: Lines of ``metrics.jsonl``.
        explicit_reward: Of ``EXPLICIT_CHARTS`` instead: the reward is a head's, and a policy is
            optimised against it.
        ln2_line: Mark ln 2 in the loss: the sigmoid margin loss where the policy is its reference.
    """
    steps = [line.get("step") for line in metrics]
    starts = _round_starts(metrics)
    charts = []
    for curves in EXPLICIT_CHARTS if explicit_reward else STEP_CHARTS:
        series = [(*_points(steps, [_speed(m) if key == "tokens_per_second" else m.get(key)
                                    for m in metrics]), label, colour)
                  for key, label, colour in curves.lines]
        series = [line for line in series if len(line[0])]
        if not series:
            continue
        figure, axes = _new_axes("optimizer step", curves.ylabel)
        for x, y, label, colour in series:
            _draw_line(axes, x, y, label, colour, starts)
        if curves.title == "Loss" and ln2_line:
            axes.axhline(math.log(2), color=_INK, linewidth=0.7, linestyle=":")
            axes.annotate("ln 2", (1.0, math.log(2)), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8, color=_INK)
        if curves.log and _spans_decades([y for _, y, _, _ in series]):
            axes.set_yscale("log")
        for start in starts:
            axes.axvline(start, color=_INK, alpha=0.45, linewidth=0.5)
        _add_legend(axes, len(series))
        charts.append(Chart(curves.title, _to_svg(figure, curves.title), curves.note))
    return charts


def evaluation_charts(rows: Sequence[tuple[str, Record]]) -> list[Chart]:
    """Return charts over evaluations, the one before training first.

    Args:
        rows: (label, evaluation) in order; exact match gets 95% Wilson intervals.
    """
    labels = [label for label, _ in rows]
    charts = []
    figure, axes = _new_axes("evaluation", "share of answers")
    drawn = 0
    for offset, key, label, colour in ((-0.05, "exact_match", "sampled", SAMPLE),
                                       (0.05, "greedy_exact_match", "greedy", DEMO)):
        known = [(i, share_of(row, key)) for i, (_, row) in enumerate(rows)]
        known = [(i, *wilson_interval(*counts), counts[0] / counts[1])
                 for i, counts in known if counts]
        if known:
            x, low, high, share = np.array(known).T
            axes.errorbar(x + offset, share, yerr=np.clip([share - low, high - share], 0, None),
                          color=colour, label=label, marker="o", markersize=3.5, capsize=2,
                          elinewidth=0.9)
            drawn += 1
    if drawn:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        charts.append(_categories(figure, axes, labels, drawn, "Exact match",
                                  "Held-out answers; bars are 95% Wilson intervals."))
    for key, title, ylabel in (("nll", "Held-out NLL", "nats per token"),
                               ("reward_accuracy", "Held-out reward accuracy", "share of pairs"),
                               ("reward_margin", "Held-out margin", "reward"),
                               ("preference_accuracy", "Held-out preferences", "share of pairs"),
                               ("sample_length", "Held-out sample length", "tokens")):
        charts += _by_category(labels, [row for _, row in rows], ((key, "", OTHER),), title, ylabel)
    return charts


def round_charts(rounds: Sequence[Record]) -> list[Chart]:
    """Return charts over finished rounds: engine-trainer mismatch and where the time went."""
    labels = [str(record.get("round", i)) for i, record in enumerate(rounds)]
    charts = _by_category(
        labels, [_mapping(record.get("mismatch")) for record in rounds],
        (("mean_abs", "mean |Δ|", DEMO), ("max_abs", "max |Δ|", SAMPLE)),
        "Engine-trainer mismatch", "nats per token", log=True, xlabel="round",
        note="Difference of the sampler's and the trainer's log-probability of the same token.")
    rewards = [_mapping(record.get("rewards")) for record in rounds]
    charts += _by_category(
        labels, rewards, (("demo_mean", "demonstrations", DEMO), ("sample_mean", "samples", SAMPLE),
                          ("sample_std", "spread of samples", MARGIN)),
        "Rewards after reward learning", "of the head", xlabel="round")
    charts += _by_category(
        labels, rewards, (("kl_to_reference", "KL", MARGIN),), "KL to the reference",
        "nats per response", xlabel="round", note="Of the policy that drew the round's samples.")
    charts += _by_category(
        labels, [_mapping(record.get("generation")) for record in rounds],
        (("repetition", "repeated 4-grams", SAMPLE), ("demo_repetition", "demonstrations'", DEMO),
         ("eos_rate", "ended by EOS", OTHER)),
        "Samples", "share", xlabel="round")
    parts = [_mapping(record.get("time")) for record in rounds]
    totals = np.array([sum(_number(part.get(key)) for key, _ in _TIME_PARTS) for part in parts])
    if not len(totals) or not totals.all():
        return charts
    figure, axes = _new_axes("share of the round's time", "round")
    left = np.zeros(len(parts))
    y = np.arange(len(parts))
    for key, colour in _TIME_PARTS:
        share = np.array([_number(part.get(key)) for part in parts]) / totals
        if share.any():
            axes.barh(y, share, left=left, color=colour, height=0.7, label=key)
        left += share
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _set_ticks(axes.yaxis, labels)
    axes.invert_yaxis()
    axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=9,
                handlelength=1, columnspacing=0.8, frameon=False, labelcolor=_INK)
    return [*charts, Chart("Time", _to_svg(figure, "Time"))]


_TIME_PARTS = (("generation", SAMPLE), ("reference", MARGIN), ("scoring", EXTRA),
               ("train", DEMO), ("evaluation", OTHER))


def _by_category(labels: Sequence[str], records: Sequence[Record],
                 lines: Sequence[tuple[str, str, str]], title: str, ylabel: str, *,
                 log: bool = False, xlabel: str = "evaluation", note: str = "") -> list[Chart]:
    figure, axes = _new_axes(xlabel, ylabel)
    drawn: list[np.ndarray] = []
    for key, label, colour in lines:
        x, y = _points(range(len(records)), [record.get(key) for record in records])
        if len(x):
            axes.plot(x, y, color=colour, label=label, marker="o", markersize=3.5)
            drawn.append(y)
    if not drawn:
        return []
    if log and _spans_decades(drawn):
        axes.set_yscale("log")
    return [_categories(figure, axes, labels, len(drawn), title, note)]


def _categories(figure: Figure, axes: Axes, labels: Sequence[str], drawn: int, title: str,
                note: str) -> Chart:
    axes.set_xlim(-0.4, max(len(labels) - 0.6, 0.4))
    _set_ticks(axes.xaxis, labels)
    _add_legend(axes, drawn)
    return Chart(title, _to_svg(figure, title), note)


def _new_axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(True, color="#8888", linewidth=0.3)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    return figure, axes


def _draw_line(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, colour: str,
               starts: Sequence[float]) -> None:
    """Plot a series; a noisy long one faintly, under running means that stop at round starts."""
    window = len(y) // 25
    if window < 3:
        axes.plot(*_thin(x, y), color=colour, label=label, marker="o" if len(y) == 1 else None,
                  markersize=3)
        return
    axes.plot(*_thin(x, y), color=colour, alpha=0.25, linewidth=0.7)
    cuts = np.searchsorted(x, starts)
    for i, (part_x, part_y) in enumerate(zip(np.split(x, cuts), np.split(y, cuts), strict=True)):
        axes.plot(*_thin(part_x, _running_mean(part_y, window)), color=colour,
                  label=None if i else label)


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the ``window`` points around each, of fewer at the ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(y)])
    start = np.maximum(np.arange(len(y)) - half, 0)
    stop = np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (sums[stop] - sums[start]) / (stop - start)


def _spans_decades(series: Sequence[np.ndarray]) -> bool:
    values = np.concatenate(series)
    return bool(values.min() > 0 and values.max() > 20 * values.min())


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stride = max(1, -(-len(x) // _MAX_POINTS))
    return x[::stride], y[::stride]


def _round_starts(metrics: Sequence[Record]) -> list[float]:
    """Return a step value between every two steps of different rounds."""
    return [line["step"] - 0.5 for previous, line in zip(metrics, metrics[1:], strict=False)
            if line.get("round") != previous.get("round") and _is_number(line.get("step"))]


def _add_legend(axes: Axes, num_lines: int) -> None:
    if num_lines > 1:
        axes.legend(ncols=num_lines, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9,
                    handlelength=1.2, columnspacing=1.2, frameon=False, labelcolor=_INK)


def _set_ticks(axis: Any, labels: Sequence[str]) -> None:
    stride = max(1, -(-len(labels) // 8))
    axis.set_ticks(range(0, len(labels), stride), labels=labels[::stride])


def _points(x: Sequence[Any] | range, y: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    kept = [(a, b) for a, b in zip(x, y, strict=True) if _is_number(a) and _is_number(b)]
    array = np.array(kept, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _speed(line: Record) -> float | None:
    if line.get("tokens_per_second") is not None:
        return line["tokens_per_second"]
    tokens, seconds = line.get("tokens"), line.get("time/step")
    return tokens / seconds if _is_number(tokens) and _is_number(seconds) and seconds else None


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and math.isfinite(value))


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else 0.0


def _mapping(value: Any) -> Record:
    return value if isinstance(value, Mapping) else {}


def _to_svg(figure: Figure, title: str) -> str:
    """Render for inlining: no prolog or metadata, ids of its own, the page's text colour."""
    name = re.sub(r"\W+", "-", title).strip("-").lower()
    stream = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = svg.replace(_INK, "currentColor")
    return re.sub(r">\s+<", "><", svg)
