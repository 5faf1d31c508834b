"""The algorithm (arXiv 2405.17888, Algorithms 1 and 2) on one screen.

    for each round t:
        sample z ~ pi(.|x) for the round's prompts        Megatron's inference engine
        cache log pi_ref of demonstrations and samples    one evaluation pass, no second model
        irft: K optimizer steps on h(beta * g)            Megatron's schedules and optimizer
        rft:  optimizer steps on r(demo) - r(sample), score the samples once,
              then policy steps on E[r] - beta * KL(pi || pi_ref)
        evaluate on held-out demonstrations

SFT is the same loop without the first two lines; SPIN is a round per pass over the data. What a
phase trains on is in ``phases.py``.
"""

import sys
import time
from pathlib import Path
from typing import Any

from megatron_irl.algorithms.phases import Phase, Work, few_items, phases
from megatron_irl.config import Recipe
from megatron_irl.convert.export import export_hf
from megatron_irl.convert.reward_export import export_hf_reward
from megatron_irl.data.pair_bank import chunk_seed, usable_pairs
from megatron_irl.errors import TrainingDiverged
from megatron_irl.evaluation.hacking import hacking_signs
from megatron_irl.evaluation.heldout import evaluate, evaluate_reward, heldout_pairs
from megatron_irl.model.reward_head import reward_head
from megatron_irl.parallel.topology import Topology
from megatron_irl.run.rounds import fill_bank
from megatron_irl.run.session import Inputs, Session, is_finished, open_session
from megatron_irl.train.batches import Item, draw, microbatches_for, num_tokens
from megatron_irl.train.optimizer import build_schedule, current_lr, reset_optimizer
from megatron_irl.types import PackedBatch


def train(inputs: Inputs, topology: Topology, argv: list[str] | None = None) -> None:
    """Run a recipe to its end, from wherever its folder stands. Collective over every rank."""
    if is_finished(inputs, topology):
        return
    session = open_session(inputs, topology, argv or sys.argv)
    state, algorithm = session.state, session.recipe.algorithm
    try:
        if state.step == 0 and evaluates_before(session.recipe):
            state.evaluation = evaluate(session, next_round=0)
        while state.round < algorithm.rounds:
            summary = open_round(session)
            for phase in phases(algorithm):
                run_phase(session, phase)
            close_round(session, summary | state.summary)
    except TrainingDiverged as error:
        raise TrainingDiverged(
            f"{error} (round {state.round}, {state.step_in_round} steps into it, lr "
            f"{current_lr(session.optimizer):.3g}); training stopped. The last good state is "
            f"{session.checkpointer.describe_latest()}. Set optimizer.lr lower or more warmup, "
            "and a new output_dir."
        ) from error
    finish(session)


def open_round(session: Session) -> dict[str, Any]:
    """Sample for the round's prompts and cache the reference; returns what the round's line says
    of it.
    """
    algorithm, state = session.recipe.algorithm, session.state
    if state.step_in_round == 0 and state.round > 0 and algorithm.reset_optimizer == "round":
        reset_optimizer(session.optimizer)
        session.scheduler = build_schedule(session.recipe, session.optimizer)
    if not algorithm.is_pairwise:
        return {}
    summary = fill_bank(session, state.round)
    heldout_pairs(session, state.round)  # its references too belong to the round's start
    if not session.topology.is_main:  # who writes the round's line
        return summary
    drawn = session.bank.read_round(state.round)
    summary["generation"] |= usable_pairs(drawn)[1] | {  # of the whole round, however often resumed
        "tokens": sum(len(pair.sample_ids) for pair in drawn),
        "truncated": sum(pair.finish_reason == "length" for pair in drawn),
        **hacking_signs(drawn),
    }
    return summary


def run_phase(session: Session, phase: Phase) -> None:
    """The steps of a phase that are still to be done."""
    state = session.state
    if state.step_in_round > phase.last:
        return
    work = phase.prepare(session)
    state.summary |= work.summary
    num_draws = (phase.last - phase.first) * session.recipe.train.global_batch_size
    warning = few_items(work, num_draws)
    if warning:
        session.recorder.warn(f"{phase.name} steps of round {state.round}: {warning}")
    if not work.items:
        state.step_in_round = phase.last
    while state.step_in_round < phase.last:
        optimizer_step(session, phase, work)


def optimizer_step(session: Session, phase: Phase, work: Work) -> None:
    """One update on a global batch; checkpoint and log after it."""
    state, recipe = session.state, session.recipe
    start = time.perf_counter()
    batch, microbatches = draw_batch(session, phase, work)
    lr = current_lr(session.optimizer)
    with session.timed("train"):
        result = session.stepper.train_step(
            microbatches, work.objective, heads=work.heads, frozen=work.frozen,
            where=f"at step {state.step + 1}",
        )
    session.scheduler.step(1)
    state.step += 1
    state.step_in_round += 1
    session.recorder.step(
        state, result, lr=lr, tokens=sum(map(num_tokens, batch)),
        seconds=time.perf_counter() - start, phase=phase.name,
    )
    interval = recipe.checkpoint.interval
    if interval and state.step % interval == 0:
        session.save()


def draw_batch(
    session: Session, phase: Phase, work: Work
) -> tuple[list[Item], list[PackedBatch]]:
    """The global batch of the next step, and this rank's microbatches of it."""
    state, options = session.state, session.recipe.train
    batch: list[Item] = []
    microbatches: list[PackedBatch] = []
    for stream, outlasts_round in ((work.items, work.outlasts_round), (work.second, True)):
        if not stream:
            continue
        step, begun_in = state.step_in_round - phase.first, state.round
        if outlasts_round:
            step, begun_in = step + state.round * (phase.last - phase.first), 0
        seed = chunk_seed(session.recipe.seed, begun_in, min(phase.first, 1))
        drawn = draw(stream, seed, step, options.global_batch_size)
        batch += drawn
        microbatches += microbatches_for(
            drawn, session.topology, micro_batch_size=options.micro_batch_size,
            multiple_of=session.multiple_of,
        )
    return batch, microbatches


def close_round(session: Session, summary: dict[str, Any]) -> None:
    """Evaluate, write the round's line, and checkpoint the start of the next round."""
    state, algorithm = session.state, session.recipe.algorithm
    last = state.round + 1 == algorithm.rounds
    reward = evaluate_reward(session, state.round)
    evaluation: dict[str, Any] = {}
    interval = session.recipe.evaluation.interval
    if interval == "round" or (interval == "end" and last):
        evaluation = evaluate(session, next_round=state.round + 1)
    record = {
        "round": state.round, "step": state.step, **summary,
        "evaluation_before": state.evaluation.get("numbers", {}),
        "evaluation": evaluation.get("numbers", {}) | reward,
        "examples": examples(state.evaluation, evaluation),
        "time": state.seconds | {"total": sum(state.seconds.values())},
    }
    if algorithm.is_pairwise:
        record |= {"beta": algorithm.beta[state.round], "reference": algorithm.reference}
    session.recorder.round(state, record)
    state.round += 1
    state.step_in_round = 0
    state.evaluation = evaluation
    state.summary = {}
    state.seconds = {}
    session.save()


def finish(session: Session) -> None:
    """Leave the policy, and an explicit reward, as HF folders; mark the run finished."""
    data, folder = session.recipe.data, session.folder
    companions: dict[str, Any] = {
        "source_dir": session.hf_dir, "topology": session.topology,
        "tokenizer_path": Path(data.tokenizer) if data.tokenizer else None,
        "chat_template": session.tokenizer.chat_template if data.chat_template else None,
    }
    session.progress.note(f"writing {folder.hf}")
    export_hf(session.chunks, session.architecture, session.hf_config, folder.hf, **companions)
    if session.recipe.algorithm.name == "rft":
        session.progress.note(f"writing {folder.hf_reward}")
        head = reward_head(session.chunks)
        export_hf_reward(
            session.chunks, head.weight if head is not None else None, session.architecture,
            session.hf_config, folder.hf_reward, **companions,
        )
    if session.topology.is_main:
        session.folder.finish()
    session.recorder.close()
    session.progress.note(f"done: {session.folder.path / 'report.html'}")
    session.topology.barrier()


def evaluates_before(recipe: Recipe) -> bool:
    """Whether the starting model is evaluated."""
    options = recipe.evaluation
    return options.interval != "never" if options.before is None else options.before


def examples(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """The same held-out prompts answered before and after the round."""
    later = {e["prompt"]: e["response"] for e in after.get("examples", [])}
    return [
        {"prompt": e["prompt"], "demonstration": e["demonstration"], "before": e["response"],
         "after": later[e["prompt"]]}
        for e in before.get("examples", [])
        if e["prompt"] in later
    ]
