"""What a run writes about itself: metric lines, round lines, trackers, warnings, the report."""

from collections.abc import Callable
from typing import Any

from megatron_irl.algorithms.base import Algorithm
from megatron_irl.config import Recipe
from megatron_irl.config.resolve import to_mapping
from megatron_irl.console import Console
from megatron_irl.run.folder import RunFolder
from megatron_irl.run.guard import CollapseGuard
from megatron_irl.run.prediction import Prediction, compared
from megatron_irl.run.report import write_report
from megatron_irl.run.runlog import RunLog
from megatron_irl.run.spikes import SpikeGuard
from megatron_irl.run.state import RunState
from megatron_irl.run.trackers import Trackers, build_trackers
from megatron_irl.timing import Clock
from megatron_irl.train.step import StepResult


class Recorder:
    """The main rank's records; every other rank holds one that does nothing.

    The two logs are the record, and a run that cannot write them stops. Trackers and report only
    show it: their failures are warnings.

    Args:
        fence: Called before each write of the logs; raises if the folder is not ours any more.
        kept: What ``log.recent()`` gave when the checkpoint that the run resumes from was saved.
    """

    def __init__(
        self, folder: RunFolder, recipe: Recipe, algorithm: Algorithm, console: Console,
        clock: Clock, state: RunState, *, is_main: bool,
        fence: Callable[[], None] | None = None, kept: Any = None,
    ) -> None:
        self.folder, self.recipe, self.console, self.clock = folder, recipe, console, clock
        self.is_main = is_main
        self.guard = CollapseGuard(has_implicit_reward=algorithm.reward != "explicit")
        self.spikes = SpikeGuard(recipe.train.spike_factor)
        self._has_phases = len(algorithm.phases(recipe)) > 1
        self._warned: list[str] = []  # in the round in progress, besides the guard
        self._failed: set[str] = set()  # what has failed and was said
        self._is_reported = False
        self.log = RunLog(folder.path, fence)
        self.trackers = Trackers([])
        if not is_main:
            return
        for text in self.log.level(state.step, state.round, kept):
            console.warn(text)
        for line in self.log.read_metrics():
            if line["round"] == state.round:
                self._replay(line)
        options = recipe.logging
        self.trackers = build_trackers(
            folder.path, to_mapping(recipe), tensorboard=options.tensorboard, wandb=options.wandb,
            wandb_project=options.wandb_project, wandb_mode=options.wandb_mode,
            resume_step=state.step or None, warn=console.warn,
        )

    def step(self, state: RunState, result: StepResult, *, lr: float, tokens: int,
             seconds: float, phase: str, speed: dict[str, float] | None = None) -> set[str]:
        """Record one optimizer step.

        Args:
            speed: Utilisation and memory, see ``Speedometer``; of a checkpoint that was finished
                since the last step, what it took.

        Returns:
            What the guards want done, by the recipe: ``halve_lr``, ``end_round``.

        Raises:
            UserError: The log cannot be written.
        """
        if not self.is_main:
            return set()
        line = {
            "step": state.step, "round": state.round, "loss": result.loss,
            "grad_norm": result.grad_norm, "lr": lr, **result.metrics, "tokens": tokens,
            "time/step": seconds, "tokens_per_second": tokens / seconds,
            "staleness": state.step_in_round - 1, **(speed or {}),
        }
        # Nothing here reads the device: the numbers came with the step's one reduction.
        if state.step_in_round == 1:  # what the round took before its first step
            line |= {f"time/{name}": taken for name, taken in self.clock.seconds.items()
                     if name != "train"}
        if self._has_phases:  # losses of several phases are not one curve
            line |= {"phase": phase, f"{phase}/loss": result.loss}
        self.log.log_metrics(line)
        self.guard.feed(line)
        if state.step % self.recipe.logging.interval == 0:
            self._try("trackers", lambda: self.trackers.log(state.step, line))
        algorithm = self.recipe.algorithm
        self.console.step(
            line, total_steps=algorithm.rounds * (algorithm.steps_per_round or 0),
            generation_share=self.clock.share("generation"), total_rounds=algorithm.rounds,
        )
        return self._watch(line, phase)

    def _replay(self, line: dict[str, Any]) -> None:
        """Take a step of before a kill: what it warned of was said, and belongs to the round."""
        self.guard.feed(line)
        self.guard.step_warnings()
        spike = self.spikes.feed(line.get("loss"), line.get("phase", ""))
        if spike and self.recipe.train.on_spike != "ignore":
            self._warned.append(self._of_spike(spike, line))

    def _of_spike(self, spike: str, line: dict[str, Any]) -> str:
        return f"{spike} (step {line['step']}; train.on_spike={self.recipe.train.on_spike})"

    def _watch(self, line: dict[str, Any], phase: str) -> set[str]:
        """Warn of what the guards find in a step; what the recipe wants done about it."""
        options, wanted = self.recipe.train, set()
        for warning in self.guard.step_warnings():
            self.console.warn(warning)
            wanted.add(options.on_collapse)
        spike = self.spikes.feed(line["loss"], phase if self._has_phases else "")
        if spike and options.on_spike != "ignore":
            self.warn(self._of_spike(spike, line))
            wanted.add(options.on_spike)
        return wanted - {"warn"}

    def round(self, record: dict[str, Any]) -> None:
        """Log a finished round; adds the guard's findings to ``record``.

        Raises:
            UserError: The log cannot be written.
        """
        if not self.is_main:
            return
        found = self.guard.check(record.get("generation"))
        self.guard.start_round()
        self.spikes.start_round()
        for warning in found:
            self.console.warn(warning)
        record["guard"], self._warned = self._warned + found, []
        self.log.log_round(record)
        self.console.round(record)

    def compare(self, prediction: Prediction, generation: dict[str, Any]) -> None:
        """Say what the plan was beside what the first round measured; never raises."""
        def say() -> None:
            plan = prediction.plan()
            for line in compared(plan, self.log.read_metrics(), generation) if plan else ():
                self.console.note(line)

        self._try("the comparison with the plan", say)

    def publish(self, record: dict[str, Any]) -> None:
        """Show a finished round in trackers and report. After its checkpoint; never raises."""
        if not self.is_main:
            return
        self._try("trackers", lambda: self._track(record))
        self._report()

    def _track(self, record: dict[str, Any]) -> None:
        shown = {k: v for k, v in record.items() if k not in ("step", "round", "examples")}
        self.trackers.log(record["step"], {"round": shown})
        for example in record.get("examples", []):
            self.trackers.log_text(record["step"], "samples", _as_text(example))

    def _report(self) -> None:
        self._is_reported = self._try("report.html", lambda: write_report(self.folder.path))

    def _try(self, what: str, show: Callable[[], Any]) -> bool:
        """Whether something that only shows the run worked; the first failure is said.

        Broad on purpose: a chart, a template, a tracker's client or its network may fail in any
        way, and none of it is worth a run.
        """
        try:
            show()
        except Exception as error:  # noqa: BLE001
            if what not in self._failed:
                self._failed.add(what)
                self.console.warn(f"{what} failed and the run goes on: {type(error).__name__}: "
                                  f"{error}")
            return False
        return True

    def warn(self, text: str) -> None:
        """Say something of the round in progress, on the console and in the round's line."""
        if self.is_main:
            self.console.warn(text)
            self._warned.append(text)

    def close(self) -> None:
        """Flush the trackers; a run that was killed before its last report gets it now."""
        if self.is_main and not self._is_reported:
            self._report()
        self._try("trackers", self.trackers.close)


def _as_text(example: dict[str, Any]) -> str:
    return "\n\n".join(f"[{key}]\n{value}" for key, value in example.items())
