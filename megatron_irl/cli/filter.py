"""``filter``: the demonstrations that a run's reward thinks well of, as a file to train on."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_irl.cli.outputs import check_out
from megatron_irl.config import load_recipe
from megatron_irl.config.run_files import LEDGER, RECIPE
from megatron_irl.data.conversation import Conversation
from megatron_irl.data.formats import prompt_of
from megatron_irl.data.ledger import (
    LedgerRow,
    complete_rounds,
    ledger_rounds,
    read_ledger,
    record_digest,
)
from megatron_irl.data.records import collect
from megatron_irl.data.sources import Reading, training_reading
from megatron_irl.data.turns import Turns, conversations_of
from megatron_irl.errors import UserError
from megatron_irl.storage.commit import write_jsonl_atomically


def filter_demonstrations(
    run: Path,
    out: Path,
    *,
    min_reward: float | None = None,
    top_quantile: float | None = None,
    round: int | None = None,
    overwrite: bool = False,
) -> str:
    """Write the records of ``data.train`` whose ledger reward is high enough, in their order.

    Of a run with ``data.turns: each`` every turn kept is written as a record of its own, with what
    came before it: to be trained on with ``data.turns: last``.

    Args:
        run: Run folder with a demonstration ledger.
        out: JSONL file to write; the records are as in the run's files, other fields included.
        min_reward: Keep rewards of at least this.
        top_quantile: Keep the best share, in (0, 1], rounded up; records that tie with the last
            one kept are kept too. Exactly one of the two.
        round: Of the ledger; None: the newest. It must have every demonstration.
        overwrite: Replace ``out`` if it is there.

    Returns:
        One line for the user.

    Raises:
        UserError: No ledger, or one of some demonstrations only; both thresholds or none, nothing
            that reaches the threshold, files that have changed since the run or cannot be found,
            an ``out`` that cannot be used.
    """
    _check_options(run, out, min_reward, top_quantile)
    check_out(out, overwrite)
    rounds = ledger_rounds(run / LEDGER)
    if not rounds:
        raise UserError(f"{run} has no demonstration ledger. Runs with algorithm.name=rft write "
                        "one, each round after its reward steps.")
    rows = read_ledger(run / LEDGER, round)
    chosen = rounds[-1] if round is None else round
    _check_complete(run, chosen, len(rows))
    rewards = sorted((row.reward for row in rows), reverse=True)
    if top_quantile is not None:
        threshold = rewards[math.ceil(top_quantile * len(rows)) - 1]
    else:
        assert min_reward is not None
        threshold = min_reward
    records = _unchanged_records(run, rows, out)
    # A source with a weight above 1 has several rows a record.
    sources = dict.fromkeys(row.source for row in rows if row.reward >= threshold)
    kept = [records[source] for source in sources]
    where = f"round {chosen}"
    if not kept:
        raise UserError(f"--min-reward {min_reward} leaves no demonstration; the highest reward in "
                        f"{where} is {rewards[0]:.6g}. Set it lower, or use --top-quantile.")
    write_jsonl_atomically(out, kept)
    return (f"kept {len(kept)} of {len(rows)} demonstrations, those with a reward of at least "
            f"{threshold:.6g} in {where}: {out}")


def _check_options(
    run: Path, out: Path, min_reward: float | None, top_quantile: float | None
) -> None:
    if not (run / RECIPE).exists():
        raise UserError(f"{run} is not a run folder: it has no {RECIPE}.")
    if (min_reward is None) == (top_quantile is None):
        given = "neither is given" if min_reward is None else "both are given"
        raise UserError(f"--min-reward and --top-quantile: {given}. Give exactly one.")
    if min_reward is not None and not math.isfinite(min_reward):
        raise UserError(f"--min-reward {min_reward} is not a finite number.")
    if top_quantile is not None and not 0 < top_quantile <= 1:
        raise UserError(f"--top-quantile {top_quantile} must be above 0 and at most 1; 0.25 keeps "
                        "the best quarter.")
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out} must end with .jsonl, the form it is written in.")


def _check_complete(run: Path, round: int, num_rows: int) -> None:
    complete = complete_rounds(run / LEDGER)
    if round in complete:
        return
    remedy = (f"Rounds that have all: {', '.join(map(str, complete))}; set --round to one."
              if complete else
              "Start `megatron-irl train` on the run again to finish it, or set "
              "reward.ledger=every_round for a new run.")
    raise UserError(f"round {round} of {run} has the rewards of the {num_rows} demonstrations that "
                    "it sampled for and not of the others, which with reward.ledger=last are "
                    f"scored in the last round only. {remedy}")


def _unchanged_records(
    run: Path, rows: Sequence[LedgerRow], out: Path
) -> dict[str, dict[str, Any]]:
    """The records by ``file:line``, as the files are now, if they still say what was scored."""
    paths = [Path(p) for p in dict.fromkeys(row.source.rpartition(":")[0] for row in rows)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)} of the run's data.train cannot be found from the "
                        f"working directory {Path.cwd()}. Start the command where the run was "
                        "started, or put the files back.")
    if out.resolve() in {path.resolve() for path in paths}:
        raise UserError(f"--out {out} is a file of the run's data.train. Choose another one.")

    reading, turns = _reading(run, paths)

    def build(found: list[Conversation], record: dict[str, Any]) -> list[Any]:
        (whole,) = found
        return [
            (each.source, record_digest(prompt_of(each), each.messages[-1]["content"]),
             record if turns == "last" else _as_record(each))
            for each in conversations_of(whole, turns)]

    reading = replace(reading, part="all")  # what was held out has no row
    now = {source: (found, record) for records in collect(reading, build)
           for source, found, record in records}
    changed = [row.source for row in rows if now.get(row.source, ("", {}))[0] != row.digest]
    if changed:
        raise UserError(f"{changed[0]} is not the record that the run scored ({len(changed)} of "
                        f"{len(rows)} differ): the file has changed since. Put the run's version "
                        "back, or run it again.")
    return {source: record for source, (_, record) in now.items()}


def _reading(run: Path, paths: Sequence[Path]) -> tuple[Reading, Turns]:
    """How the run read the files that its ledger names, and which turns it learnt."""
    try:
        data = load_recipe(run / RECIPE, check_files=False).data
    except UserError:  # the recipe is for people to look at; what was read, the digests tell
        return Reading(tuple(paths)), "last"
    return training_reading(data, []), data.turns


def _as_record(conversation: Conversation) -> dict[str, Any]:
    """A turn of a conversation as a record of its own, for runs with ``data.turns: each``."""
    if conversation.plain:
        prompt, response = (message["content"] for message in conversation.messages)
        record: dict[str, Any] = {"prompt": prompt, "response": response}
    else:
        record = {"messages": conversation.messages}
    parts = {"tools": conversation.tools, "answer": conversation.answer,
             "chat_template_kwargs": conversation.template_args}
    return record | {name: value for name, value in parts.items() if value}
