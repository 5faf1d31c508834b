"""What the ranks agree on after every step: whether to save, and whether to stop."""

from megatron_irl.parallel.agreement import agree, stop
from megatron_irl.run.run import Run


def between_steps(run: Run) -> None:
    """Save if it is time to, or stop if any rank was asked to. Collective over every rank.

    Raises:
        RunStopped: On every rank; whoever catches it saves.
    """
    topology, state = run.topology, run.state
    topology.heart.place = f"step {state.step}, round {state.round}"
    topology.heart.beat()
    asked, due, *saving = agree(
        [topology.stop.level, save_is_due(run), *run.checkpointer.status()], topology
    )
    run.checkpointer.take_note(*saving)
    if asked:
        stop(topology)
    if due:
        run.save()


def save_is_due(run: Run) -> bool:
    """By steps, which every rank counts alike, or by the main rank's clock."""
    options = run.recipe.checkpoint
    if options.interval and run.state.step % options.interval == 0:
        return True
    minutes = options.interval_minutes
    return bool(minutes and run.topology.is_main and run.seconds_since_save() >= 60 * minutes)
