"""What the planner says of a run: before it is built, and beside what its first round measured.

What is certain is refused by arithmetic. The whole plan is made in a process of its own while the
run starts: it needs process groups that are not this run's, and the CPU platform.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_irl import hardware
from megatron_irl.config import Recipe, check_layout, to_yaml
from megatron_irl.console import Console
from megatron_irl.data.corpus import Corpus
from megatron_irl.planning.certain import refuse_what_cannot_fit
from megatron_irl.planning.machines import GIB, NEAR
from megatron_irl.run.inputs import Headers

OFF = 0.15  # a prediction that is off by more is named
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


def check_memory(headers: Headers, recipe: Recipe) -> None:
    """Refuse a run that cannot fit the devices it is started on. For every rank alike.

    Raises:
        UserError: Weights, gradients and optimizer state are more than a device has.
    """
    world_size, local = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_RANK", "0")
    size = check_layout(recipe, int(world_size) if world_size else None)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size or 1)
    said = refuse_what_cannot_fit(
        recipe, headers.architecture, headers.adapter, data_parallel_size=size,
        device_memory=hardware.device_memory(int(local), here),
    )
    if said is not None:
        Console(enabled=os.environ.get("RANK", "0") == "0").warn(said)


class Prediction:
    """A plan in the making; for the main rank.

    Args:
        recipe: Resolved.
        machine: As ``plan --gpu`` takes it.
        data: Whose mean lengths are planned with.
        warn: Told as soon as the plan is there if it says that memory is short.
    """

    def __init__(
        self, recipe: Recipe, machine: str, world_size: int, data: Corpus,
        warn: Callable[[str], None],
    ) -> None:
        rows = data.demonstrations
        some = [rows[i] for i in range(0, len(rows), max(1, len(rows) // 256))]
        prompt, response = (max(1, round(sum(lengths) / len(some))) for lengths in (
            [len(d.prompt_ids) for d in some], [len(d.response_ids) for d in some]))
        self._warn = warn if recipe.parallel.memory_check != "off" else lambda _: None
        self._plan: dict[str, Any] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-irl-plan-")
        path = Path(self._folder.name) / "planned.yaml"
        path.write_text(to_yaml(recipe))
        environment = {k: v for k, v in os.environ.items()
                       if k not in _OF_RANKS and not k.startswith("SLURM_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_irl", "plan", str(path), "--json", "--gpu", machine,
             "--world-size", str(world_size), "--lengths", f"{prompt},{response},{len(rows)}"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment | {"MEGATRON_IRL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        )
        self._thread = threading.Thread(target=self._read, name="plan", daemon=True)
        self._thread.start()

    def plan(self, seconds: float = 60.0) -> dict[str, Any] | None:
        """The plan; None if none could be made. Waits no longer than that."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._process.kill()
        return self._plan

    def _read(self) -> None:
        said, _ = self._process.communicate()
        self._folder.cleanup()
        try:
            plan = json.loads(said.splitlines()[-1])
        except (ValueError, IndexError):
            return
        self._plan = plan
        for text in shortages(plan):
            self._warn(text)
        if plan["advice"]:
            self._warn(f"by the plan {plan['advice']}")


def shortages(plan: Mapping[str, Any]) -> list[str]:
    """What a plan says of memory that is short, with the largest terms and the nearest change.

    Args:
        plan: As ``plan --json`` prints it.
    """
    memory = plan["gpu_memory"]
    stage = max(plan["stages"], key=lambda stage: stage["needed"])
    if not plan["fits"]:
        changes = [" ".join(one["overrides"]) for one in plan["layouts"][:1]]
        return [f"by the plan this run {plan['verdict']}. "
                + (f"What fits and is fastest: {changes[0]}" if changes else
                   "No layout of so many ranks fits")]
    if stage["needed"] > NEAR * memory:
        largest = sorted(stage["terms"].items(), key=lambda term: -term[1])[:3]
        terms = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
        return [f"by the plan this run takes {stage['needed'] / GIB:.1f} of {memory / GIB:.1f} GiB "
                f"on stage {stage['stage']} (largest terms, GiB: {terms}); if it runs out of "
                "memory, lower train.micro_batch_size or train.micro_batch_tokens, or see "
                "`megatron-irl plan --search`"]
    return [] if plan["always_fits"] else [f"by the plan this run {plan['verdict']}"]


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
        planned = max(stage["phases"]["training"] for stage in plan["stages"]) / GIB
        pairs["memory while training"] = planned, max(peaks), "GiB"
    later = steps[1:] or steps
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
