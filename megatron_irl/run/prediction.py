"""What the planner said of a run, beside what its first round measured.

The plan is made in a process of its own while the run starts: it needs process groups that are not
this run's, and the CPU platform.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_irl.data.corpus import Corpus

OFF = 0.15  # a prediction that is off by more is named
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


class Prediction:
    """A plan in the making; for the main rank.

    Args:
        recipe: The run folder's ``recipe.yaml``.
        machine: As ``plan --gpu`` takes it.
        data: Whose mean lengths are planned with.
    """

    def __init__(self, recipe: Path, machine: str, world_size: int, data: Corpus) -> None:
        rows = data.demonstrations
        some = [rows[i] for i in range(0, len(rows), max(1, len(rows) // 256))]
        prompt, response = (max(1, round(sum(lengths) / len(some))) for lengths in (
            [len(d.prompt_ids) for d in some], [len(d.response_ids) for d in some]))
        environment = {k: v for k, v in os.environ.items()
                       if k not in _OF_RANKS and not k.startswith("SLURM_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_irl", "plan", str(recipe), "--json", "--gpu", machine,
             "--world-size", str(world_size), "--lengths", f"{prompt},{response},{len(rows)}"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment | {"MEGATRON_IRL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        )

    def plan(self, seconds: float = 60.0) -> dict[str, Any] | None:
        """The plan; None if none could be made. Waits no longer than that."""
        try:
            said, _ = self._process.communicate(timeout=seconds)
            return json.loads(said.splitlines()[-1])
        except (subprocess.TimeoutExpired, ValueError, IndexError):
            self._process.kill()
            return None


def compared(
    plan: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], generation: Mapping[str, Any]
) -> list[str]:
    """A line for what was planned and measured, and one for what was off the most.

    Args:
        plan: As ``plan --json`` prints it.
        steps: Lines of ``metrics.jsonl`` of the first round.
        generation: Of the line of ``rounds.jsonl``.
    """
    pairs: dict[str, tuple[float, float, str]] = {}
    peaks = [line["memory/peak_allocated"] for line in steps if "memory/peak_allocated" in line]
    if peaks:
        planned = max(stage["phases"]["training"] for stage in plan["stages"]) / 2**30
        pairs["memory while training"] = planned, max(peaks), "GiB"
    later = [line for line in steps[1:]] or list(steps)
    for name, seconds in plan["step_seconds"].items():
        of_phase = sorted(line["time/step"] for line in later if line.get("phase", name) == name)
        if of_phase:
            pairs[f"{name} step"] = seconds, of_phase[len(of_phase) // 2], "s"
    if generation.get("tokens_per_second"):
        pairs["generation"] = (plan["generation_tokens_per_second"],
                               generation["tokens_per_second"], "tokens/s")
    if not pairs:
        return []
    lines = ["planned and measured: " + "; ".join(
        f"{name} {planned:,.4g} and {real:,.4g} {unit}"
        for name, (planned, real, unit) in pairs.items())]
    worst = max(pairs, key=lambda name: _off(*pairs[name][:2]))
    planned, real, _ = pairs[worst]
    if _off(planned, real) > OFF:
        lines.append(f"most off the plan is {worst}: {real / planned:.2f} times. {_reason(worst)}")
    return lines


def _off(planned: float, real: float) -> float:
    return max(real / planned, planned / real) - 1 if planned > 0 and real > 0 else 0.0


def _reason(what: str) -> str:
    if what == "generation":
        return "The plan takes samples to be as long as demonstrations, and decoding to run in " \
               "CUDA graphs."
    if what.startswith("memory"):
        return "The plan takes Transformer Engine's fused attention, and the packs of mean records."
    return "The plan takes the shares of an H100's peak that docs/scaling.md has, and mean records."
