"""Evaluations side by side: the columns, their text, and confidence intervals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_irl.evaluation.intervals import wilson_interval

Evaluation = Mapping[str, Any]


def compare_table(rows: Sequence[tuple[str, Evaluation]]) -> str:
    """Return a plain-text table of evaluations, one row each; columns nobody has are left out.

    Args:
        rows: (name, evaluation) with the keys of ``evaluation`` in ``rounds.jsonl``.

    Returns:
        Lines joined by newlines, aligned for a fixed-width font. Exact match is shown as a
        percentage, its count, and its 95% Wilson interval.
    """
    columns = shown_columns([evaluation for _, evaluation in rows])
    table = [["", *(title for title, _ in columns)]]
    table += [[name, *(text(evaluation) or "-" for _, text in columns)]
              for name, evaluation in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
             for row in table]
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def shown_columns(evaluations: Sequence[Evaluation]) -> list[tuple[str, Callable]]:
    """Return (title, evaluation -> text or None) of every column some evaluation has."""
    return [(title, text) for title, text in COLUMNS
            if any(text(evaluation) for evaluation in evaluations)]


def share_of(evaluation: Evaluation, key: str) -> tuple[int, int] | None:
    """Return (count, total) of an exact-match key where both are known."""
    count, total = evaluation.get(f"{key}_count"), evaluation.get("num_answers")
    if not isinstance(count, int) or not isinstance(total, int) or not 0 <= count <= total:
        return None
    return (count, total) if total else None


def _number(key: str, form: str) -> Callable[[Evaluation], str | None]:
    def text(evaluation: Evaluation) -> str | None:
        value = evaluation.get(key)
        return format(value, form) if isinstance(value, int | float) else None
    return text


def _share(key: str) -> Callable[[Evaluation], str | None]:
    def text(evaluation: Evaluation) -> str | None:
        counts = share_of(evaluation, key)
        if counts is None:
            return _number(key, ".1%")(evaluation)
        low, high = wilson_interval(*counts)
        count, total = counts
        return f"{count / total:.1%} ({count}/{total}) [{100 * low:.1f}, {100 * high:.1f}]"
    return text


COLUMNS: tuple[tuple[str, Callable[[Evaluation], str | None]], ...] = (
    ("NLL/token", _number("nll", ".4f")),
    ("exact match [95%]", _share("exact_match")),
    ("greedy exact match [95%]", _share("greedy_exact_match")),
    ("reward acc.", _number("reward_accuracy", ".1%")),
    ("margin", _number("reward_margin", "+.3f")),
    ("preference acc.", _number("preference_accuracy", ".1%")),
    ("length", _number("sample_length", ".1f")),
    ("EOS rate", _number("eos_rate", ".1%")),
)
