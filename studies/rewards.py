"""Whether a learned reward tells right demonstrations from wrong ones."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_irl.storage.commit import write_jsonl_atomically
from studies.commands import command


def reward_auc(run: Path, start: Path, demonstrations: Path, folder: Path) -> float | None:
    """Area under the ROC curve of a run's reward over its own demonstrations, right over wrong.

    Args:
        run: Of rft, whose ``hf_reward/`` is asked, or another, whose policy is against ``start``.
        folder: Where the rewards go.

    Returns:
        None if all demonstrations are of one kind.
    """
    records = [json.loads(line) for line in demonstrations.read_text().splitlines()]
    is_right = np.array([record["is_right"] for record in records])
    if is_right.all() or not is_right.any():
        return None
    out = folder / "rewards.jsonl"
    if not out.exists():
        pairs = folder / "to_score.jsonl"
        write_jsonl_atomically(pairs, (
            {"prompt": r["prompt"], "responses": [r["response"]]} for r in records))
        explicit = (run / "hf_reward").exists()
        model = ("--model", run / "hf_reward") if explicit else (
            "--model", run / "hf", "--reference", start)
        command("score", *model, "--pairs", pairs, "--out", out)
    rewards = np.array([json.loads(line)["rewards"][0] for line in out.read_text().splitlines()])
    return area_under_curve(rewards[is_right], rewards[~is_right])


def area_under_curve(
    positive: npt.NDArray[np.floating], negative: npt.NDArray[np.floating]
) -> float:
    """Probability that a positive is above a negative; ties count half."""
    above = (positive[:, None] > negative[None]).mean()
    ties = (positive[:, None] == negative[None]).mean()
    return float(above + ties / 2)
