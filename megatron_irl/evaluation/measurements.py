"""Measured numbers, and two models' numbers side by side: what got better, what got worse."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_irl.evaluation.intervals import Z, paired_share_error, wilson_interval

Better = Literal["higher", "lower", "half"]
"""Which way is good; ``half``: the nearer to 0.5 the better, as for the share of stereotypes."""
VERDICTS = {"better": "better", "worse": "WORSE", "unclear": "~", "same": "=", "none": ""}


@dataclass(frozen=True)
class Measurement:
    """One number of one model.

    Attributes:
        of: The task or set, and
        metric: what was measured on it.
        better: None where no direction is good in itself.
        value: The number.
        stderr: Its standard error; None where unknown.
        count: Items it was measured on.
        items: float64 [count], whose mean is ``value``, in the same order for every model; None
            where it is no mean.
        is_share: Whether items are right or wrong, 1 or 0, or half of it.
    """

    of: str
    metric: str
    better: Better | None
    value: float
    stderr: float | None
    count: int
    items: np.ndarray | None = field(default=None, compare=False, repr=False)
    is_share: bool = False

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95% interval of a share: a standard error of zero would claim too much."""
        return wilson_interval(self.value * self.count, self.count) if self.is_share else None


def mean_of(
    of: str, metric: str, better: Better | None, items: Sequence[float] | np.ndarray, *,
    is_share: bool = False,
) -> Measurement:
    """The mean of some items with its standard error."""
    values = np.asarray(items, np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Measurement(
        of, metric, better, float(values.mean()), error, len(values), values, is_share)


def side_by_side(
    before: Sequence[Measurement], after: Sequence[Measurement]
) -> list[dict[str, Any]]:
    """Rows of a table, in the order of ``after``: plain values, as JSON holds them.

    A row has ``of``, ``metric``, ``better``, ``count``; ``before`` and ``after`` with their
    ``_stderr`` and, of shares, ``_interval``; where both are known ``change``, ``change_stderr``
    and a ``verdict``: ``better`` or ``worse`` if the change is more than its 95% interval,
    ``unclear`` if it is not, ``same`` if there is none. Items that both models answered are
    compared pair by pair.
    """
    known = {(m.of, m.metric): m for m in before}
    return [_row(known.get((m.of, m.metric)), m) for m in after]


def _row(old: Measurement | None, new: Measurement) -> dict[str, Any]:
    row: dict[str, Any] = {
        "of": new.of, "metric": new.metric, "better": new.better, "count": new.count,
        "before": old.value if old else None, "before_stderr": old.stderr if old else None,
        "after": new.value, "after_stderr": new.stderr,
        "before_interval": old.interval if old else None, "after_interval": new.interval,
    }
    if old is None:
        return row | {"change": None, "change_stderr": None, "verdict": "none"}
    error = _stderr_of_change(old, new)
    return row | {"change": new.value - old.value, "change_stderr": error,
                  "verdict": _verdict(old, new, error)}


def _stderr_of_change(old: Measurement, new: Measurement) -> float | None:
    if old.items is not None and new.items is not None and len(old.items) == len(new.items) > 1:
        differences = new.items - old.items
        if old.is_share and new.is_share:
            return paired_share_error(differences)
        return float(differences.std(ddof=1) / math.sqrt(len(differences)))
    if old.stderr is None or new.stderr is None:
        return None
    return math.hypot(old.stderr, new.stderr)


def _verdict(old: Measurement, new: Measurement, error: float | None) -> str:
    if new.better is None or math.isnan(new.value) or math.isnan(old.value):
        return "none"
    goodness = {"higher": lambda v: v, "lower": lambda v: -v, "half": lambda v: -abs(v - 0.5)}
    gain = goodness[new.better](new.value) - goodness[new.better](old.value)
    if gain == 0:
        return "same"
    if error is None or abs(gain) <= Z * error:
        return "unclear"
    return "better" if gain > 0 else "worse"


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A header and a line a row, as text."""
    lines = [["", "metric", "n", "before", "after", "change [95%]", ""]]
    for row in rows:
        arrow = {"higher": " ↑", "lower": " ↓", "half": " → 0.5", None: ""}[row["better"]]
        lines.append([
            row["of"], row["metric"] + arrow, str(row["count"]),
            _number(row, "before"), _number(row, "after"),
            _change(row), VERDICTS[row["verdict"]],
        ])
    return lines


def _number(row: dict[str, Any], side: str) -> str:
    value, error = row[side], row[f"{side}_stderr"]
    if value is None:
        return "–"
    if (interval := row.get(f"{side}_interval")) is not None:  # which earlier versions did not keep
        return f"{value:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"
    return f"{value:.4f}" if error is None else f"{value:.4f} ±{Z * error:.4f}"


def _change(row: dict[str, Any]) -> str:
    change, error = row["change"], row["change_stderr"]
    if change is None:
        return "–"
    if error is None:
        return f"{change:+.4f}"
    low, high = change - Z * error, change + Z * error
    if row.get("after_interval") is not None:
        low, high = max(low, -1.0), min(high, 1.0)
    return f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a fixed-width font, and a line about how many got better and worse."""
    lines = table(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = ["  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
             for line in lines]
    shown.insert(1, "-" * max(map(len, shown)))
    counts = {name: sum(row["verdict"] == name for row in rows) for name in VERDICTS}
    if any(counts[name] for name in ("better", "worse", "unclear", "same")):
        shown.append(f"{counts['better']} better, {counts['worse']} worse, {counts['unclear']} "
                     f"within their interval (~), {counts['same']} the same (=)")
    return "\n".join(shown)
