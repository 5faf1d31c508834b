"""Whether a learned reward tells right demonstrations from wrong ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_irl.data.ledger import read_ledger
from megatron_irl.storage.commit import write_jsonl_atomically
from studies.commands import command
from studies.lines import read_lines


def reward_auc(
    run: Path, start: Path, demonstrations: Path, folder: Path, options: Sequence[Any] = ()
) -> float | None:
    """Area under the ROC curve of a run's reward over its own demonstrations, right over wrong.

    Args:
        run: With the ledger of rft, whose reward is explicit, or another, whose policy is asked
            against ``start``.
        folder: Where the rewards go.
        options: Of ``megatron-irl score``.

    Returns:
        None if all demonstrations are of one kind.
    """
    records = read_lines(demonstrations)
    is_right = np.array([record["is_right"] for record in records])
    if is_right.all() or not is_right.any():
        return None
    if (run / "ledger").exists():
        rows = sorted(read_ledger(run / "ledger"), key=lambda row: row.ordinal)
        rewards = np.array([row.reward for row in rows])
    else:
        rewards = _implicit(run, start, records, folder, options)
    return area_under_curve(rewards[is_right], rewards[~is_right])


def _implicit(
    run: Path, start: Path, records: list[dict[str, Any]], folder: Path, options: Sequence[Any]
) -> npt.NDArray[np.floating]:
    out = folder / "rewards.jsonl"
    if not out.exists():
        pairs = folder / "to_score.jsonl"
        write_jsonl_atomically(pairs, (
            {"prompt": r["prompt"], "responses": [r["response"]]} for r in records))
        command("score", "--model", run / "hf", "--reference", start, "--pairs", pairs,
                "--out", out, *options)
    return np.array([line["rewards"][0] for line in read_lines(out)])


def area_under_curve(
    positive: npt.NDArray[np.floating], negative: npt.NDArray[np.floating]
) -> float:
    """Probability that a positive is above a negative; ties count half."""
    above = (positive[:, None] > negative[None]).mean()
    ties = (positive[:, None] == negative[None]).mean()
    return float(above + ties / 2)
