"""The algorithm (arXiv 2405.17888, Algorithm 2) on one screen.

    for each round t:
        sample z ~ pi(.|x) for the round's prompts        Megatron's inference engine
        cache log pi_ref of demonstrations and samples    one evaluation pass, no second model
        K optimizer steps on h(beta * g)                  Megatron's schedules and optimizer
        evaluate on held-out demonstrations

SFT is the same loop without the first two lines; SPIN is a round per pass over the data.
"""

import sys
import time
from pathlib import Path
from typing import Any

from megatron_irl.config import Recipe
from megatron_irl.convert.export import export_hf
from megatron_irl.data.pair_bank import chunk_seed, usable_pairs
from megatron_irl.errors import TrainingDiverged
from megatron_irl.parallel.topology import Topology
from megatron_irl.train.batches import Item, draw, microbatches_for
from megatron_irl.train.evaluate import evaluate, evaluate_reward, heldout_pairs
from megatron_irl.train.objective import build_objective
from megatron_irl.train.optimizer import build_schedule, current_lr, reset_optimizer
from megatron_irl.train.rounds import fill_bank, previous_pairs
from megatron_irl.train.session import Inputs, Session, is_finished, open_session
from megatron_irl.train.step import Objective
from megatron_irl.types import Pair


def train(inputs: Inputs, topology: Topology, argv: list[str] | None = None) -> None:
    """Run a recipe to its end, from wherever its folder stands. Collective over every rank."""
    if is_finished(inputs, topology):
        return
    session = open_session(inputs, topology, argv or sys.argv)
    state, algorithm = session.state, session.recipe.algorithm
    steps_per_round = algorithm.steps_per_round or 0  # resolved: never None
    try:
        if state.step == 0 and evaluates_before(session.recipe):
            state.evaluation = evaluate(session, next_round=0)
        while state.round < algorithm.rounds:
            items, opening = open_round(session)
            objective = build_objective(session.recipe, state.round)
            while state.step_in_round < steps_per_round and items:
                optimizer_step(session, items, objective)
            close_round(session, items, opening)
    except TrainingDiverged as error:
        raise TrainingDiverged(
            f"{error} (round {state.round}, {state.step_in_round} steps into it, lr "
            f"{current_lr(session.optimizer):.3g}); training stopped. The last good state is "
            f"{session.checkpointer.describe_latest()}. Set optimizer.lr lower or more warmup, "
            "and a new output_dir."
        ) from error
    finish(session)


def open_round(session: Session) -> tuple[list[Item], dict[str, Any]]:
    """What the round trains on: usable pairs with cached references, or demonstrations."""
    algorithm, state = session.recipe.algorithm, session.state
    if state.step_in_round == 0 and state.round > 0 and algorithm.reset_optimizer == "round":
        reset_optimizer(session.optimizer)
        session.scheduler = build_schedule(session.recipe, session.optimizer)
    if not algorithm.is_pairwise:
        return list(session.demonstrations), {}
    summary = fill_bank(session, state.round)
    heldout_pairs(session, state.round)  # its references too belong to the round's start
    drawn = session.bank.read_round(state.round)
    pairs, counts = usable_pairs(drawn)
    summary["generation"] |= counts | {  # of the whole round, however often it was resumed
        "tokens": sum(len(pair.sample_ids) for pair in drawn),
        "truncated": sum(pair.finish_reason == "length" for pair in drawn),
        "mean_length": sum(len(pair.sample_ids) for pair in drawn) / len(drawn),
    }
    if algorithm.mix_previous and state.round > 0:
        pairs += usable_pairs(previous_pairs(session, state.round))[0]
    return list(pairs), summary


def optimizer_step(session: Session, items: list[Item], objective: Objective) -> None:
    """One update on a global batch; checkpoint and log after it."""
    state, recipe, train_config = session.state, session.recipe, session.recipe.train
    start = time.perf_counter()
    seed = chunk_seed(recipe.seed, state.round, 0)
    batch = draw(items, seed, state.step_in_round, train_config.global_batch_size)
    microbatches = microbatches_for(
        batch, session.topology, micro_batch_size=train_config.micro_batch_size,
        multiple_of=session.multiple_of,
    )
    lr = current_lr(session.optimizer)
    with session.timed("train"):
        result = session.stepper.train_step(
            microbatches, objective, where=f"at step {state.step + 1}"
        )
    session.scheduler.step(1)
    state.step += 1
    state.step_in_round += 1
    session.recorder.step(
        state, result, lr=lr, tokens=sum(map(num_tokens, batch)),
        seconds=time.perf_counter() - start,
    )
    interval = recipe.checkpoint.interval
    if interval and state.step % interval == 0:
        session.save()


def close_round(session: Session, items: list[Item], opening: dict[str, Any]) -> None:
    """Evaluate, write the round's line, and checkpoint the start of the next round."""
    state, algorithm = session.state, session.recipe.algorithm
    last = state.round + 1 == algorithm.rounds
    reward = evaluate_reward(session, state.round)
    evaluation: dict[str, Any] = {}
    interval = session.recipe.evaluation.interval
    if interval == "round" or (interval == "end" and last):
        evaluation = evaluate(session, next_round=state.round + 1)
    record = {
        "round": state.round, "step": state.step, **opening,
        "evaluation_before": state.evaluation.get("numbers", {}),
        "evaluation": evaluation.get("numbers", {}) | reward,
        "examples": examples(state.evaluation, evaluation),
        "time": state.seconds | {"total": sum(state.seconds.values())},
    }
    if algorithm.is_pairwise:
        record |= {"beta": algorithm.beta[state.round], "reference": algorithm.reference}
        record["lengths"] = mean_lengths(items)
    session.recorder.round(state, record)
    state.round += 1
    state.step_in_round = 0
    state.evaluation = evaluation
    state.seconds = {}
    session.save()


def finish(session: Session) -> None:
    """Leave an HF folder and mark the run finished."""
    data = session.recipe.data
    session.progress.note(f"writing {session.folder.hf}")
    export_hf(
        session.chunks, session.architecture, session.hf_config, session.folder.hf,
        source_dir=session.hf_dir, topology=session.topology,
        tokenizer_path=Path(data.tokenizer) if data.tokenizer else None,
        chat_template=session.tokenizer.chat_template if data.chat_template else None,
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


def num_tokens(item: Item) -> int:
    """Tokens a step processes for one item: prompt and response of each of its sequences."""
    if isinstance(item, Pair):
        return 2 * len(item.prompt_ids) + len(item.demo_ids) + len(item.sample_ids)
    return len(item.prompt_ids) + len(item.response_ids)


def mean_lengths(items: list[Item]) -> dict[str, float]:
    pairs = [item for item in items if isinstance(item, Pair)]
    count = max(1, len(pairs))
    return {
        "demo_mean": sum(len(pair.demo_ids) for pair in pairs) / count,
        "sample_mean": sum(len(pair.sample_ids) for pair in pairs) / count,
    }
