"""What the ranks agree on after a step: to save, to stop, to heed a guard, to pass it over."""

from collections.abc import Set

from megatron_irl.algorithms.base import Phase
from megatron_irl.errors import TrainingDiverged
from megatron_irl.parallel.agreement import agree, stop
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.run.post_mortem import write_post_mortem
from megatron_irl.run.run import Run
from megatron_irl.train.finite import NotFinite
from megatron_irl.train.step import StepResult


def between_steps(run: Run, phase: Phase, wanted: Set[str], failure: Exception | None) -> None:
    """Save if it is time to, or stop if any rank was asked to. Collective over every rank.

    Args:
        wanted: What the main rank's guards ask for.
        failure: Why the main rank could not record the step; None elsewhere, and if it could.

    Raises:
        RunStopped: On every rank; whoever catches it saves.
        UserError: The failure, on every rank.
    """
    topology, state = run.topology, run.state
    topology.heart.place = f"step {state.step}, round {state.round}"
    topology.heart.beat()
    # All questions in one all-reduce, the only one of a step that is not training's; its answers
    # are the same on every rank, and so are the collectives that follow from them.
    asked, due, halve, end, failed, *saving = agree(
        [topology.stop.level, save_is_due(run), "halve_lr" in wanted, "end_round" in wanted,
         failure is not None, *run.checkpointer.status()],
        topology,
    )
    if failed:
        on_main(lambda: _raise(failure), topology)
    run.checkpointer.settle(*saving)
    if halve:
        state.lr_scale /= 2
        run.trainer.stepper.lr_scale = state.lr_scale
        run.console.note(f"the learning rate is halved: {state.lr_scale:g} of the schedule's")
    if end and state.step_in_round < phase.last:
        run.console.note(f"the {phase.name} steps of round {state.round} end after "
                         f"{state.step_in_round - phase.first} of {phase.last - phase.first}")
        state.step_in_round = phase.last
    if asked:
        stop(topology)
    if due:
        run.save()


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def save_is_due(run: Run) -> bool:
    """By steps, which every rank counts alike, or by the main rank's clock."""
    options = run.recipe.checkpoint
    if options.interval and run.state.step % options.interval == 0:
        return True
    minutes = options.interval_minutes
    return bool(minutes and run.topology.is_main and run.seconds_since_save() >= 60 * minutes)


def skip_or_stop(run: Run, phase: str, bad: NotFinite) -> tuple[StepResult, int]:
    """Pass over a step that took no update, if the recipe says so and not too many did.

    Every rank has found the same and so decides the same; the batch is kept for a look at it.

    Returns:
        As ``Trainer.step``.

    Raises:
        TrainingDiverged: The run stops.
    """
    # No collective in here: what each rank writes is its own, and a failure to is a warning.
    folder, options = write_post_mortem(run, phase, bad), run.recipe.train
    if options.on_nonfinite == "stop":
        raise bad
    if run.state.skipped >= options.max_skips:
        raise TrainingDiverged(f"{bad}, after {run.state.skipped} skipped steps "
                               f"(train.max_skips={options.max_skips})") from bad
    run.state.skipped += 1
    run.recorder.warn(f"{bad}; the step is skipped, its batch is in {folder}")
    return run.trainer.skip(bad)
