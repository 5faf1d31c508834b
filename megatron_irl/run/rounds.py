"""The start of a round: sample from the policy, cache the reference, commit both to the bank."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from megatron_irl.algorithms.round import Round
from megatron_irl.data.pair_index import counts
from megatron_irl.data.round_pairs import RoundPairs
from megatron_irl.data.sampler import OrderedSampler
from megatron_irl.evaluation.hacking import hacking_signs
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.policy.pairs import sample_pairs
from megatron_irl.policy.references import add_references, index_pairs, open_pairs
from megatron_irl.run.adapter_rounds import merge_round
from megatron_irl.run.run import Run
from megatron_irl.storage.commit import checked_json, read_json, write_file
from megatron_irl.train.batches import chosen
from megatron_irl.train.offload import offloaded
from megatron_irl.types import Demonstration


def open_round(run: Run) -> tuple[Round, dict[str, Any]]:
    """Sample for the round's prompts and cache the reference.

    Returns:
        What the round's phases work with, and what its line says of the samples.

    Collectives: every rank must call.
    """
    state = run.state
    # A checkpoint of a round's start was saved before this, so whoever resumes there does it too;
    # none is saved between here and the first step.
    if state.step_in_round == 0 and state.round > 0:
        merge_round(run)
        if run.recipe.algorithm.reset_optimizer == "round":
            run.trainer.restart()
    pairs, summary = RoundPairs(run.bank, state.round), {}
    if run.algorithm.draws_samples:
        pairs, summary = fill_bank(run, state.round)
        # Its references too belong to the round's start.
        run.evaluator.cache_references(state.round, run.reference_weights)
        summary["generation"] |= describe_samples(index_pairs(pairs, run.topology).index)
        summary["generation"] |= run.speedometer.generation(
            summary["generation"], run.recipe.generation.max_requests
        )
    run.checkpointer.settle_if_ended()  # of the round before
    round = Round(
        recipe=run.recipe, index=state.round, policy=run.policy, data=run.data, pairs=pairs,
        previous_bank=run.previous_bank, ledger=run.folder.ledger,
        reference_weights=run.reference_weights, console=run.console, clock=run.clock,
    )
    return round, summary


def fill_bank(run: Run, round_index: int) -> tuple[RoundPairs, dict[str, Any]]:
    """Bring the round's pairs and references on disk, whatever part of them is there already.

    Returns:
        The pairs, and what generation and the mismatch measurement found; the latter is kept beside
        the pairs so that a resumed run reports the same.

    Collectives: every rank must call. The folder must be one that all ranks see.
    """
    topology = run.topology
    summary_path = run.folder.pairs / f"round_{round_index:04d}" / "summary.json"
    # Rank 0's look decides for all: what follows is collective, and two looks may differ.
    known = on_main(lambda: read_json(summary_path), topology)
    if run.bank.has_references(round_index) and known is not None:
        return open_pairs(run.bank, round_index), known
    if run.state.step_in_round:  # what is measured at a round's start cannot be any more
        run.recorder.warn(f"{summary_path} is missing or damaged; the line of round {round_index} "
                          "will lack what was measured at the round's start")
        return open_pairs(run.bank, round_index), {"generation": {}, "mismatch": {}}
    is_offloaded = run.recipe.generation.offload_optimizer
    # Around sampling only: a reference pass needs less than training.
    with offloaded(run.policy.chunks, run.trainer.optimizer) if is_offloaded else nullcontext():
        generation = sample_pairs(
            run.policy, run.bank, round_index,
            round_demonstrations(
                run.data.demonstrations, run.recipe.algorithm.prompts_per_round or 0,
                run.recipe.seed, round_index,
            ),
            sampling=run.sampling, part_size=run.recipe.generation.part_size,
            samples_per_prompt=run.algorithm.samples_per_prompt(run.recipe),
            scheme=run.evaluator.scheme, console=run.console, clock=run.clock,
        )
    choice = run.policy.generator.choice if run.policy.generator else None
    if choice is not None:  # on all ranks alike
        on_main(lambda: run.folder.note_pipeline(choice), topology)
    pairs = open_pairs(run.bank, round_index)
    references = add_references(
        run.policy, pairs, weights_of=run.reference_weights, console=run.console, clock=run.clock
    )
    summary = {"generation": generation, **references}
    on_main(lambda: write_file(summary_path, checked_json(summary)), topology)
    return pairs, summary


def round_demonstrations(
    demonstrations: Sequence[Demonstration], size: int, seed: int, round_index: int
) -> Sequence[Demonstration]:
    """The demonstrations of a round: disjoint slices of one shuffle, epoch after epoch."""
    taken = OrderedSampler(len(demonstrations), seed, round_index * size).take(size)
    return chosen(demonstrations, taken)  # mapped ones are made as they are sampled for


def describe_samples(index: np.ndarray) -> dict[str, Any]:
    """What the round's line says of all its samples, however often the run was resumed."""
    return counts(index["kind"]) | {
        "tokens": int(index["sample_length"].sum()),
        "truncated": int((~index["stopped"]).sum()),
        **hacking_signs(index),
    }
