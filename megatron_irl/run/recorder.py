"""What a run writes about itself: metric lines, round lines, trackers, warnings, the report."""

import time
from dataclasses import asdict
from typing import Any

from megatron_irl.config import Recipe
from megatron_irl.console import Progress
from megatron_irl.run.folder import RunFolder
from megatron_irl.run.guard import CollapseGuard
from megatron_irl.run.report import write_report
from megatron_irl.run.runlog import RunLog
from megatron_irl.run.state import RunState
from megatron_irl.run.trackers import Trackers, build_trackers
from megatron_irl.train.step import StepResult


class Recorder:
    """The main rank's records; every other rank holds one that does nothing."""

    def __init__(
        self, folder: RunFolder, recipe: Recipe, progress: Progress, state: RunState, *,
        is_main: bool,
    ) -> None:
        self.folder, self.recipe, self.progress, self.is_main = folder, recipe, progress, is_main
        self.guard = CollapseGuard(has_implicit_reward=recipe.algorithm.name != "rft")
        self._warned: list[str] = []  # in the round in progress, besides the guard
        self.log = RunLog(folder.path)
        self.trackers = Trackers([])
        self._generating = 0.0
        self._started = time.perf_counter()
        if not is_main:
            return
        self.log.truncate(state.step, state.round)
        for line in self.log.read_metrics():
            if line["round"] == state.round:
                self.guard.feed(line)
        options = recipe.logging
        self.trackers = build_trackers(
            folder.path, asdict(recipe), tensorboard=options.tensorboard, wandb=options.wandb,
            wandb_project=options.wandb_project, wandb_mode=options.wandb_mode,
            resume_step=state.step or None,
        )

    def step(self, state: RunState, result: StepResult, *, lr: float, tokens: int,
             seconds: float, phase: str) -> None:
        """Record one optimizer step."""
        if not self.is_main:
            return
        line = {
            "step": state.step, "round": state.round, "loss": result.loss,
            "grad_norm": result.grad_norm, "lr": lr, **result.metrics, "tokens": tokens,
            "time/step": seconds, "tokens_per_second": tokens / seconds,
            "staleness": state.step_in_round - 1,
        }
        if self.recipe.algorithm.name == "rft":  # two losses that are not one curve
            line |= {"phase": phase, f"{phase}/loss": result.loss}
        self.log.log_metrics(line)
        self.guard.feed(line)
        if state.step % self.recipe.logging.interval == 0:
            self.trackers.log(state.step, line)
        algorithm = self.recipe.algorithm
        total = algorithm.rounds * (algorithm.steps_per_round or 0)
        share = self._generating / (time.perf_counter() - self._started)
        self.progress.step(
            line, total_steps=total, generation_share=share, total_rounds=algorithm.rounds
        )
        for warning in self.guard.step_warnings():
            self.progress.warn(warning)

    def round(self, state: RunState, record: dict[str, Any]) -> None:
        """Record a finished round; adds the guard's findings and rewrites the report."""
        if not self.is_main:
            return
        found = self.guard.check(record.get("generation"))
        self.guard.start_round()
        for warning in found:
            self.progress.warn(warning)
        record["guard"], self._warned = self._warned + found, []
        self.log.log_round(record)
        shown = {k: v for k, v in record.items() if k not in ("step", "round", "examples")}
        self.trackers.log(state.step, {"round": shown})
        for example in record.get("examples", []):
            self.trackers.log_text(state.step, "samples", _as_text(example))
        write_report(self.folder.path)

    def warn(self, text: str) -> None:
        """Say something of the round in progress, on the console and in the round's line."""
        if self.is_main:
            self.progress.warn(text)
            self._warned.append(text)

    def generated(self, seconds: float) -> None:
        """Count time spent generating, for the share shown while training."""
        self._generating += seconds

    def close(self) -> None:
        self.trackers.close()


def _as_text(example: dict[str, Any]) -> str:
    return "\n\n".join(f"[{key}]\n{value}" for key, value in example.items())
