"""The algorithm (arXiv 2405.17888, Algorithms 1 and 2) on one screen.

    for each round t:
        sample z ~ pi(.|x) for the round's prompts        Megatron's inference engine
        cache log pi_ref of demonstrations and samples    one evaluation pass, no second model
        irft: K optimizer steps on h(beta * g)            Megatron's schedules and optimizer
        rft:  optimizer steps on r(demo) - r(sample), score the samples once,
              then policy steps on E[r] - beta * KL(pi || pi_ref)
        evaluate on held-out demonstrations

SFT is the same loop without the first two lines; SPIN is a round per pass over the data. What a
phase trains on is the algorithm's business (``megatron_irl.algorithms``).
"""

import sys
import time
from typing import Any

from megatron_irl.algorithms.base import Phase, Work
from megatron_irl.algorithms.round import Round
from megatron_irl.collector import settled
from megatron_irl.config import Recipe
from megatron_irl.console import Console
from megatron_irl.convert.export import export_hf
from megatron_irl.errors import RunStopped, TrainingDiverged, UserError
from megatron_irl.parallel.agreement import stop_if_asked
from megatron_irl.parallel.main_rank import everywhere, on_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.run.adapter_rounds import write_adapter
from megatron_irl.run.between_steps import between_steps, skip_or_stop
from megatron_irl.run.inputs import Inputs
from megatron_irl.run.opening import is_finished, open_run
from megatron_irl.run.profiling import recorded
from megatron_irl.run.rounds import open_round
from megatron_irl.run.run import Run
from megatron_irl.run.watchdog import Watchdog
from megatron_irl.storage.shared_folder import check_shared, hold
from megatron_irl.train.finite import NotFinite
from megatron_irl.train.step import Stream, streams_of


def train(inputs: Inputs, topology: Topology, argv: list[str] | None = None) -> None:
    """Run a recipe to its end, from wherever its folder stands. Collective over every rank.

    The folder is this run's alone from before it is read until the end, however that comes.

    Example:
        recipe = load_recipe("recipe.yaml")
        inputs = read_inputs(recipe)      # what is wrong with data or model is said here
        train(inputs, initialize(recipe.parallel, seed=recipe.seed))
    """
    if is_finished(inputs.folder, topology):
        Console(enabled=topology.is_main).note(f"{inputs.folder.path} is finished; nothing to do.")
        return
    try:
        lease = hold(inputs.folder.path, topology)
    except UserError:
        if inputs.tokens is not None:
            inputs.tokens.discard_new()
        raise
    options = inputs.recipe.parallel
    watchdog = Watchdog(
        topology, seconds=options.hang_seconds, slow_seconds=60 * options.timeout_minutes,
        folder=inputs.folder.path / "hangs",
    )
    watchdog.start()
    try:
        check_shared(inputs.folder.path, topology)
        if inputs.tokens is not None:
            inputs.tokens.keep_only_these()
        # Again: another start may have held the folder until now, and finished the run.
        if not is_finished(inputs.folder, topology):
            run = open_run(inputs, topology, argv or sys.argv, lease)
            try:
                with settled():
                    train_rounds(run)
            finally:
                run.checkpointer.abandon()  # nothing where it ended well
    finally:
        watchdog.stop()
        lease.release()


def train_rounds(run: Run) -> None:
    """The rounds that are still to be done, and what the run leaves. Collective."""
    state, heart = run.state, run.topology.heart
    heart.beat()  # the start has no signs of its own, and may have taken longer than a step may
    heart.phase, heart.is_slow = "training", False
    try:
        stop_if_asked(run.topology)
        if state.step == 0 and not state.evaluation and evaluates_before(run.recipe):
            state.evaluation = run.evaluator.evaluate(next_round=0)
            run.saved = None
        while state.round < run.recipe.algorithm.rounds:
            run_round(run)
        stop_if_asked(run.topology)
    except TrainingDiverged as error:
        run.finish_saving()
        raise TrainingDiverged(
            f"{error} (round {state.round}, {state.step_in_round} steps into it, lr "
            f"{run.trainer.lr:.3g}); training stopped. The last good state is "
            f"{run.checkpointer.describe_latest()}. Set optimizer.lr lower or more warmup, "
            "and a new output_dir."
        ) from error
    except RunStopped as stop:
        run.save_unless_saved()
        run.finish_saving()
        rounds = run.recipe.algorithm.rounds
        where = f"round {state.round}" if state.round < rounds else "the last, before the export"
        raise RunStopped(
            f"{stop}; stopped at step {state.step}, {where}. The run goes on from "
            f"{run.checkpointer.describe_latest()} when the same command is started again."
        ) from None
    with run.topology.heart.within("export", slow=True):
        finish(run)


def run_round(run: Run) -> None:
    """A round, or what is left of it. Its pairs go out of memory when it returns."""
    with run.console.about("training"):
        round, summary = open_round(run)
        for phase in run.algorithm.phases(run.recipe):
            run_phase(run, round, phase)
        close_round(run, summary | run.state.summary)


def run_phase(run: Run, round: Round, phase: Phase) -> None:
    """The steps of a phase that are still to be done."""
    state = run.state
    # Not ``>=``: a phase without steps has its say all the same (rft scores its round there even
    # with no policy steps), and so has one that a run resumes right behind.
    if state.step_in_round > phase.last:
        return
    work = phase.prepare(round, state.step_in_round)
    state.summary |= work.summary
    num_draws = (phase.last - phase.first) * run.recipe.train.global_batch_size
    warning = few_items_warning(work, num_draws)
    if warning:
        run.recorder.warn(f"{phase.name} steps of round {state.round}: {warning}")
    if not work.items:
        state.step_in_round = phase.last
    steps = range(state.step_in_round, phase.last)
    # Every rank reads other files, before the steps: one that fails in the midst of them would
    # leave its peers in the schedule.
    everywhere(
        lambda: run.trainer.read_ahead(streams_at(run, phase, work, step) for step in steps),
        run.topology,
    )
    while state.step_in_round < phase.last:
        optimizer_step(run, phase, work)


def streams_at(run: Run, phase: Phase, work: Work, step: int) -> list[Stream]:
    """What the update takes its global batch of, ``step`` steps into the round."""
    return streams_of(
        ((work.items, work.outlasts_round), (work.second, True)), seed=run.recipe.seed,
        round=run.state.round, step=step, first=phase.first, last=phase.last,
    )


def optimizer_step(run: Run, phase: Phase, work: Work) -> None:
    """One update on a global batch; log and checkpoint after it."""
    state = run.state
    start = time.perf_counter()
    streams = streams_at(run, phase, work, state.step_in_round)
    lr = run.trainer.lr
    watched = recorded(
        run.recipe.profile, run.folder.path, step=state.step + 1, rank=run.topology.rank
    )
    with run.clock.timed("train"), watched:
        try:
            result, tokens = run.trainer.step(
                streams, work.objective, heads=work.heads, frozen=work.frozen,
                where=f"at step {state.step + 1}",
            )
        except NotFinite as bad:
            result, tokens = skip_or_stop(run, phase.name, bad)
    state.step += 1
    state.step_in_round += 1
    seconds = time.perf_counter() - start
    speed = run.speedometer.step(run.trainer.work, seconds, has_head=work.heads != "rewards")
    wanted, failure = set[str](), None
    try:
        wanted = run.recorder.step(
            state, result, lr=lr, tokens=tokens, seconds=seconds, phase=phase.name,
            speed=speed | run.checkpointer.take_measured(),
        )
    except Exception as error:  # rank 0's alone: the others hear of it in the agreement below,
        failure = error  # where ``on_main`` would be a collective more in every step
    between_steps(run, phase, wanted, failure)


def close_round(run: Run, summary: dict[str, Any]) -> None:
    """Evaluate, write the round's line, checkpoint the start of the next round, and only then
    report: what shows a run may fail, and the round is not lost with it.
    """
    state, algorithm = run.state, run.recipe.algorithm
    last = state.round + 1 == algorithm.rounds
    reward = run.evaluator.judge_reward(state.round, run.reference_weights)
    evaluation: dict[str, Any] = {}
    interval = run.recipe.evaluation.interval
    if interval == "round" or (interval == "end" and last):
        evaluation = run.evaluator.evaluate(next_round=state.round + 1)
    record = {
        "round": state.round, "step": state.step, **summary,
        "evaluation_before": state.evaluation.get("numbers", {}),
        "evaluation": evaluation.get("numbers", {}) | reward,
        "examples": examples(state.evaluation, evaluation),
        "time": state.seconds | {"total": sum(state.seconds.values())},
    }
    if run.algorithm.draws_samples:
        record |= {"beta": algorithm.beta[state.round], "reference": algorithm.reference}
    on_main(lambda: run.recorder.round(record), run.topology)
    if run.prediction is not None:
        run.recorder.compare(run.prediction, summary.get("generation", {}))
        run.prediction = None
    state.round += 1
    state.step_in_round = 0
    state.evaluation = evaluation
    state.summary = {}
    state.seconds.clear()  # the clock counts on in the same dictionary
    run.save(then=lambda: run.recorder.publish(record))


def finish(run: Run) -> None:
    """Leave the policy, and what else was learnt, as HF folders; mark the run finished."""
    folder, policy = run.folder, run.policy
    run.finish_saving()
    run.console.note(f"writing {folder.hf}")
    with policy.merged():
        export_hf(policy.chunks, policy.architecture, out_dir=folder.hf, **run.companions)
        run.algorithm.export(policy, folder.path, run.companions, run.console.note)
    if policy.adapters is not None:
        run.console.note(f"writing {folder.adapter}")
        policy.complete_gather()
        write_adapter(run)
    on_main(folder.finish, run.topology)
    run.recorder.close()
    run.console.note(f"done: {folder.path / 'report.html'}")
    run.topology.barrier()  # no rank leaves the group while another still writes


def evaluates_before(recipe: Recipe) -> bool:
    """Whether the starting model is evaluated."""
    options = recipe.evaluation
    return options.interval != "never" if options.before is None else options.before


def few_items_warning(work: Work, num_draws: int) -> str | None:
    """A warning if most of what was sampled cannot teach, else None.

    Args:
        num_draws: Items that the steps of the phase will draw.
    """
    if not work.items:
        return (
            f"nothing to learn from ({work.num_unusable} samples are empty or equal their "
            "demonstration); the steps are skipped. The policy may already answer as the "
            "demonstrations do: set fewer algorithm.rounds."
        )
    if work.num_unusable <= len(work.items):
        return None
    return (
        f"{work.num_unusable} of {work.num_unusable + len(work.items)} samples are empty or equal "
        f"their demonstration; the {len(work.items)} others are drawn "
        f"{num_draws / len(work.items):.1f} times each. Set fewer steps a round or more "
        "algorithm.prompts_per_round."
    )


def examples(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """The same held-out prompts answered before and after the round."""
    later = {e["prompt"]: e["response"] for e in after.get("examples", [])}
    return [
        {"prompt": e["prompt"], "demonstration": e["demonstration"], "before": e["response"],
         "after": later[e["prompt"]]}
        for e in before.get("examples", [])
        if e["prompt"] in later
    ]
